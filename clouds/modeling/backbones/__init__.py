"""Image encoders. A new one is a file here with a class registered in BACKBONE_REGISTRY."""
