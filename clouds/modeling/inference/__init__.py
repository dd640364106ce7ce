"""From class and mask predictions to label maps."""
