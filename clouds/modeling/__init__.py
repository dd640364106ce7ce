"""The networks. Importing this package registers them with the registries of `clouds.d2`."""

from clouds.modeling.backbone.clip import CLIP
from clouds.modeling.meta_arch.clouds import CLOUDS, CLOUDSHead

__all__ = ["CLIP", "CLOUDS", "CLOUDSHead"]
