"""Models: loading Qwen-VL checkpoints, the embedded tiny ones, and attention."""
