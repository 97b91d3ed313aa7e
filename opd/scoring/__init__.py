"""Metrics, judging an answer, evaluations, official scorers."""
