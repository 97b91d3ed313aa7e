"""What a run will need, from shapes alone."""
