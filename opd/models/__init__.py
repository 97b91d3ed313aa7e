"""Models: the VideoLM interface, loading, attention, positions, and the embedded tiny models."""
