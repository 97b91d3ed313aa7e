"""Readers of the public annotation formats."""
