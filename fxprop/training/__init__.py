"""How much is kept over the steps of a training."""
