"""Forwarding a prompt once, and continuing it: prefix, decoding and sampling."""
