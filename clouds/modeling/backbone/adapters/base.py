"""What an adapter is: the parameters that train in a backbone whose own weights stay as they are.

A backbone that can have one calls `build_adapter` when its layers are built and have their weights,
keeps the result as `backbone.adapter`, passes the patch tokens after each block through
`Adapter.after_block` (or a stage's feature map through `after_stage`), and returns
`Adapter.param_group_options` as its own. Adapters that change layers, such as LoRA, replace them in
the backbone; the names of the backbone's own tensors remain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fvcore.common.registry import Registry
from torch import Tensor, nn

from clouds.d2 import CfgNode

ADAPTER_REGISTRY = Registry("ADAPTER")
"""Functions `(cfg, layers: AdaptedLayers) -> Adapter` by the name in MODEL.BACKBONE.ADAPTER.NAME.

Any object that is called so can be registered.
"""


@dataclass(frozen=True)
class AdaptedLayers:
    """The layers of a backbone that an adapter acts on.

    Attributes:
        backbone: its name, for messages.
        names: of the blocks of a transformer, or of the stages of a convolutional network, relative
            to the backbone, first to last; `Adapter.after_block` is called after each.
        blocks: the modules with these names.
        widths: channels after each of them.
        root: name of the module that holds these and what precedes them (embeddings, stem).
        is_transformer: the blocks are transformer blocks, all of one width.
    """

    backbone: str
    names: Sequence[str]
    blocks: Sequence[nn.Module]
    widths: Sequence[int]
    root: str
    is_transformer: bool


class Adapter(nn.Module):
    """Base class, and the adapter `none`: it has no parameters and changes nothing.

    Attributes:
        trains_backbone: the backbone's own layers train, too.
        acts_on_tokens: `after_block` changes its input.
    """

    trains_backbone = False
    acts_on_tokens = False

    def after_block(self, index: int, tokens: Tensor) -> Tensor:
        """Adapted patch tokens after block `index`.

        Args:
            tokens: (N, L, C), without class and register tokens.
        """
        return tokens

    def after_stage(self, index: int, features: Tensor) -> Tensor:
        """`after_block` for a feature map (N, C, H, W)."""
        if not self.acts_on_tokens:
            return features
        tokens = self.after_block(index, features.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(features.shape)

    def fit(self, backbone: nn.Module) -> None:
        """Set what starts from the values of the backbone's own weights, when these were loaded."""

    def object_queries(self) -> Tensor | None:
        """Object queries (Q, D) that replace those of the mask decoder; None: it has its own."""
        return None

    def param_group_options(self) -> Mapping[str, Mapping[str, float]]:
        """See `clouds.engine.optimizer.TrainableGroups`; names are relative to the backbone."""
        return {}


MakeAdapter = Callable[[AdaptedLayers], Adapter]
"""Makes the adapter of a backbone's layers, which it may change: `build_adapter` with a config."""


def none(cfg: CfgNode, layers: AdaptedLayers) -> Adapter:
    """No adapter."""
    return Adapter()


ADAPTER_REGISTRY.register(none)


def build_adapter(cfg: CfgNode, layers: AdaptedLayers) -> Adapter:
    """The adapter that MODEL.BACKBONE.ADAPTER.NAME names; layers that it changes are replaced.

    Raises:
        KeyError: no such adapter is registered; the message lists those that are.
        ValueError: the backbone cannot have it.
    """
    name = cfg.MODEL.BACKBONE.ADAPTER.NAME
    if name not in ADAPTER_REGISTRY:
        known = ", ".join(sorted(entry for entry, _ in ADAPTER_REGISTRY))
        raise KeyError(
            f"MODEL.BACKBONE.ADAPTER.NAME {name!r} is not registered. Registered are: {known}."
        )
    adapter: Adapter = ADAPTER_REGISTRY.get(name)(cfg, layers)
    return adapter


def require_transformer(name: str, layers: AdaptedLayers) -> None:
    """Raise ValueError unless the layers are those of a transformer."""
    if not layers.is_transformer:
        raise ValueError(
            f"MODEL.BACKBONE.ADAPTER.NAME {name} adapts transformer blocks, and the backbone "
            f"{layers.backbone} has none. Use a vision transformer (MODEL.BACKBONE.NAME ViT), or "
            "one of the adapters lora, rein, full, none."
        )


def adapter_of(backbone: nn.Module) -> Adapter:
    """The backbone's adapter; one that changes nothing for a backbone that has no place for it."""
    adapter = getattr(backbone, "adapter", None)
    return adapter if isinstance(adapter, Adapter) else Adapter()
