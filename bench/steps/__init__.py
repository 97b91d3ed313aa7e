"""Optimizer steps: this project's, other loops' and those of published sizes."""
