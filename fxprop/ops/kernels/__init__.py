"""Parts of the backward that are faster than torch's own kernels on what is kept."""
