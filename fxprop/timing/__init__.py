"""Measured times, of training steps and of single layers, and what follows from them."""
