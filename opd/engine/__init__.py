"""Engines: hold the trained weights, accumulate gradients and update."""
