"""What things cost: run with `pytest bench/ --benchmark-only`."""
