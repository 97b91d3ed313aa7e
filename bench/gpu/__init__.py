"""`python -m bench.gpu`: all that needs a GPU, in parts."""
