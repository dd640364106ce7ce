"""Labels for images that nobody labelled: a teacher, what refines its labels, and their doubts."""
