"""The stages in their order: the only place that knows it. `transform`, `estimate`, `layers`, `backend`."""
