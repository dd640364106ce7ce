"""The command line, `clouds <command>`: a table of commands and one module for each.

Slow imports are inside the functions, so that --help and usage errors are fast.
"""
