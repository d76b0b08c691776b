"""Decoding loops, piece by piece."""
