"""Segment Anything as refiner of pseudo-labels."""
