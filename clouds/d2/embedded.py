"""The Detectron2 side for machines without Detectron2.

Small implementations of the part of its interface that CLOUDS and code written against it use. The
conformance tests in `tests/d2` hold both sides to the same behavior.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar, overload

import torch
from fvcore.common.config import CfgNode as CfgNode
from fvcore.common.registry import Registry as Registry
from torch import Tensor, nn
from yacs.config import CfgNode as YacsCfgNode

META_ARCH_REGISTRY = Registry("META_ARCH")
"""Whole models, called with (cfg)."""

BACKBONE_REGISTRY = Registry("BACKBONE")
"""Backbones, called with (cfg, input_shape: ShapeSpec)."""

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
"""Segmentation heads, called with (cfg, input_shape: dict[str, ShapeSpec])."""


@dataclass
class ShapeSpec:
    """Channels, height, width and stride (input pixels per pixel) of a feature map, if known."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Backbone(nn.Module, ABC):
    """Base of all backbones: images (N, 3, H, W) to a dict of named feature maps.

    A subclass either overrides `output_shape`, or sets `_out_features` (names, in order),
    `_out_feature_channels` and `_out_feature_strides` (by name), which Detectron2 reads too.
    """

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Feature maps by name, each (N, C, H / stride, W / stride)."""

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of it, pixels; 0: any size will do."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """How the input must be padded; `ImageList.from_tensors` takes it as it is.

        May hold "size_divisibility" and "square_size" (pixels), both optional.
        """
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map, by name."""
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }


Samples = list[dict[str, Any]]
V = TypeVar("V")


class _Catalog(UserDict[str, V]):
    def list(self) -> list[str]:
        """Names of all datasets."""
        return [*self]

    def remove(self, name: str) -> None:
        """Forget a dataset; KeyError if there is none of that name."""
        del self[name]


class _DatasetCatalog(_Catalog[Callable[[], Samples]]):
    """Dataset names to functions that list their samples."""

    def register(self, name: str, func: Callable[[], Samples]) -> None:
        """Add a dataset of a new name; `func` returns its samples, and is not called now."""
        assert callable(func), f"dataset {name!r}: register a function that lists the samples"
        assert name not in self, f"dataset {name!r} is registered already"
        self[name] = func

    def get(self, name: str) -> Samples:  # type: ignore[override]
        """Samples of the dataset `name`; KeyError with the known names if there is none."""
        if name not in self:
            known = ", ".join(sorted(self)) or "none"
            raise KeyError(f"dataset {name!r} is not registered; registered are: {known}")
        return self[name]()


class Metadata(SimpleNamespace):
    """What is known about one dataset, as attributes: class names, colors, kind of evaluation.

    An attribute may be set again to an equal value, but not to another one.
    """

    name: str

    def __getattr__(self, key: str) -> Any:
        # Python asks here only for what is not set. `vars` cannot come back to this method.
        known = vars(self)
        raise AttributeError(
            f"metadata of dataset {known.get('name', '?')!r} has no {key!r}; "
            f"it has: {', '.join(known)}"
        )

    def __setattr__(self, key: str, value: Any) -> None:
        known = vars(self)
        if key in known:
            # Not an `assert` statement: data would be lost where Python runs with -O.
            if known[key] != value:
                raise AssertionError(
                    f"{key!r} in the metadata of dataset {known.get('name', '?')!r} is set "
                    f"already, to {known[key]!r}; it cannot become {value!r}"
                )
            return
        super().__setattr__(key, value)

    def set(self, **values: Any) -> Metadata:
        """Set several attributes; returns itself."""
        for key, value in values.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """The attribute, or `default` when it is not set."""
        return getattr(self, key, default)

    def as_dict(self) -> dict[str, Any]:
        """A copy of all attributes."""
        return dict(vars(self))


class _MetadataCatalog(_Catalog[Metadata]):
    """Dataset names to their metadata."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        """Metadata of the dataset `name`, always the same object; empty when first asked for."""
        assert name, "a dataset needs a name"
        if name not in self:
            self[name] = Metadata(name=name)
        return self[name]


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()

R = TypeVar("R")
FromConfig = Callable[..., dict[str, Any]]
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@overload
def configurable(init_func: Callable[..., None], /) -> Callable[..., None]: ...
@overload
def configurable(*, from_config: FromConfig) -> Callable[[Callable[..., R]], Callable[..., R]]: ...
@overload
def configurable() -> Callable[[Callable[..., None]], Callable[..., None]]: ...
def configurable(
    init_func: Callable[..., None] | None = None, /, *, from_config: FromConfig | None = None
) -> Any:
    """Let a class or a function be called with a config.

    On `__init__`, the class needs a classmethod `from_config(cls, cfg, ...)` which returns the
    arguments of `__init__` as a dict. Then `A(cfg)` is `A(**A.from_config(cfg))`, and `A(1, b=2)`
    is what it always was. On any other function, `from_config` is given to the decorator:
    `@configurable(from_config=lambda cfg: {"a": cfg.A})`.

    Further arguments of a call with a config go to `from_config` where it has a parameter of
    that name; the other keyword arguments replace what `from_config` returned.

    Raises:
        AttributeError: at a call, the class has no `from_config`.
        TypeError: at a call, `from_config` is no classmethod, or its first argument is not `cfg`.
    """
    if init_func is not None:
        assert inspect.isfunction(init_func) and init_func.__name__ == "__init__", (
            "@configurable without arguments decorates __init__ only"
        )
        assert from_config is None, "a class has its own from_config"
        return _configurable_init(init_func)
    if from_config is None:
        return configurable
    assert inspect.isfunction(from_config), "from_config must be a function"
    return functools.partial(_configurable_function, from_config)


def _configurable_init(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        if not hasattr(cls, "from_config"):
            raise AttributeError(f"{cls.__name__} is configurable, so it needs a from_config.")
        if not inspect.ismethod(cls.from_config):
            raise TypeError(f"{cls.__name__}.from_config must be a classmethod.")
        args, kwargs = _arguments(cls.from_config, args, kwargs)
        init(self, *args, **kwargs)

    return wrapped


def _configurable_function(from_config: FromConfig, function: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> R:
        args, kwargs = _arguments(from_config, args, kwargs)
        return function(*args, **kwargs)

    wrapped.from_config = from_config  # type: ignore[attr-defined]
    return wrapped


def _arguments(
    from_config: FromConfig, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the decorated function, those of a config replaced by what it gives."""
    if not any(isinstance(value, YacsCfgNode) for value in (*args[:1], kwargs.get("cfg"))):
        return args, kwargs
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"the first argument of {from_config.__qualname__} must be 'cfg'.")
    if any(p.kind in _VARIADIC for p in parameters.values()):
        return (), from_config(*args, **kwargs)
    taken = {name: value for name, value in kwargs.items() if name in parameters}
    rest = {name: value for name, value in kwargs.items() if name not in parameters}
    return (), {**from_config(*args, **taken), **rest}


class DatasetEvaluator:
    """Sees every prediction on a dataset once, then gives the result."""

    def reset(self) -> None:
        """Forget everything seen; called before each round."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[Any]) -> None:
        """Take in the inputs of one batch and the model's outputs, in the same order."""

    def evaluate(self) -> dict[str, Any] | None:
        """Result over everything processed since `reset`: task name to its numbers."""
        return None


class ImageList:
    """A batch of images, padded at the bottom and at the right to a common size.

    Attributes:
        tensor: (N, ..., H, W), the padded batch.
        image_sizes: (height, width) of each image without its padding, pixels.
    """

    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]) -> None:
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, index: int) -> Tensor:
        """Image `index` without its padding, (..., h, w); a view."""
        height, width = self.image_sizes[index]
        return self.tensor[index, ..., :height, :width]

    @property
    def device(self) -> torch.device:
        """Device of the batch."""
        return self.tensor.device

    def to(self, *args: Any, **kwargs: Any) -> ImageList:
        """The same list with its tensor moved or cast; arguments as of `torch.Tensor.to`."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: Mapping[str, int] | None = None,
    ) -> ImageList:
        """Pad images to the largest height and the largest width among them, and stack them.

        Args:
            tensors: at least one image, each (..., h, w), alike but for h and w.
            size_divisibility: pad further to a multiple of it, pixels; 0 and 1: no further.
            pad_value: value of the padding.
            padding_constraints: as `Backbone.padding_constraints`. Its "size_divisibility"
                replaces the argument; a "square_size" above 0 is the height and width to pad to.
        """
        assert isinstance(tensors, (tuple, list)), f"a list of tensors, not {type(tensors)}"
        assert len(tensors) > 0, "no image"
        leading = tensors[0].shape[:-2]
        assert all(t.shape[:-2] == leading for t in tensors), [tuple(t.shape) for t in tensors]

        constraints = padding_constraints or {}
        sizes = [(int(t.shape[-2]), int(t.shape[-1])) for t in tensors]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        if constraints.get("square_size", 0) > 0:
            height = width = constraints["square_size"]
        multiple = max(1, constraints.get("size_divisibility", size_divisibility))
        height, width = (-(-side // multiple) * multiple for side in (height, width))

        batch = tensors[0].new_full((len(tensors), *leading, height, width), pad_value)
        for i, (h, w) in enumerate(sizes):
            batch[i, ..., :h, :w] = tensors[i]
        return ImageList(batch, sizes)
