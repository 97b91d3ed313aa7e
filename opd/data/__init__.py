"""Examples, annotation formats and video decoding."""
