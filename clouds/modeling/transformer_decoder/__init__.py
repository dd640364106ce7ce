"""Transformer decoders: queries and multi-scale features to classes and masks."""
