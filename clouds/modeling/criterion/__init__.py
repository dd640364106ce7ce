"""Matching of predictions with targets, and the losses."""
