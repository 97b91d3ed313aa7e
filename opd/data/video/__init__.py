"""Videos: decoding, sampling, size budgets, a cache, worker processes."""
