"""Verbs of the command line, one file each: a function named like the verb."""
