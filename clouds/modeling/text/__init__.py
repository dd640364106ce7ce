"""From class names to a classifier, through CLIP's text encoder."""
