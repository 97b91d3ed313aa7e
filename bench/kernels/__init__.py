"""Losses of two heads: who computes them, on what, and how they are measured."""
