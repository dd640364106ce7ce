"""The networks. Importing this package registers them with the registries of `clouds.d2`."""

from clouds.modeling.backbones.clip import CLIP
from clouds.modeling.clouds_model import CLOUDS
from clouds.modeling.head import CLOUDSHead

__all__ = ["CLIP", "CLOUDS", "CLOUDSHead"]
