"""Pixel decoders: backbone features to mask features and multi-scale features."""
