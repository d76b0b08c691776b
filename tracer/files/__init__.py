"""The files of a trace: written, read, checked, cut into segments."""
