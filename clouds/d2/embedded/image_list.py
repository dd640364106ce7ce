"""Images of different sizes in one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


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
