"""Backbones: images to named feature maps."""
