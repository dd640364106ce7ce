"""From backbone features to multi-scale features and per-pixel mask features."""
