"""Timings of this machine's parts."""
