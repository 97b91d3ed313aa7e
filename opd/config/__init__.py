"""Configuration: sections, merging, the command line."""
