"""The embedded task: clips, questions about them, splits."""
