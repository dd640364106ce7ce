"""Ablations: runs of named settings with several seeds, and tables that compare runs."""
