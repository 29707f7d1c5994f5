"""How much is kept in the course of training."""
