"""Memory planning: the needs of a run, computed from shapes alone."""
