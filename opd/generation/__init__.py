"""What is built on one forward of a prompt: the prefix, decoding, sampling."""
