"""Self-training on generated images: teacher, refiners, pseudo-labels (paper section 3.4)."""
