"""Prompt templates, the forms of answers, and the parser that reads them."""
