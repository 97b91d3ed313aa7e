"""Who holds the weights, accumulates gradients and steps."""
