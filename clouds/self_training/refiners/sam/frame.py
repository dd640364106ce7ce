"""The frame of a SAM: its square input, and where an image lies in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]
"""Height, width in pixels."""
Points = npt.NDArray[np.float32]
Color = tuple[float, float, float]


@dataclass(frozen=True)
class Frame:
    """Input of a SAM's image encoder.

    Attributes:
        size: height and width of the input, pixels.
        keep_aspect: the image's longer side is resized to `size`, and the image is padded at the
            bottom and right (SAM); otherwise both sides are resized to `size` (SAM 2, SAM 3).
        mean, std: of each channel, RGB, for values of 0 to 255.
    """

    size: int
    keep_aspect: bool
    mean: Color
    std: Color

    @classmethod
    def of_segment_anything(cls, sam: Any) -> Frame:
        """The frame of a `segment_anything.modeling.Sam`."""
        mean, std = (tuple(each.flatten().tolist()) for each in (sam.pixel_mean, sam.pixel_std))
        return cls(sam.image_encoder.img_size, True, mean, std)

    def resized(self, size: Size) -> Size:
        """Size of the resized image of height and width `size`, without the padding."""
        return input_size(*size, self.size) if self.keep_aspect else (self.size, self.size)

    def pixel_values(self, image: Tensor, device: torch.device | str) -> Tensor:
        """Input of the encoder, float32 (1, 3, size, size), of an image, uint8 (3, H, W) RGB."""
        assert image.dtype == torch.uint8, f"expected uint8, got {image.dtype}"
        height, width = self.resized((image.shape[1], image.shape[2]))
        pil_image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        pixels = np.array(pil_image.resize((width, height), Image.Resampling.BILINEAR))
        tensor = torch.from_numpy(pixels).to(device).permute(2, 0, 1).contiguous()
        mean, std = (tensor.new_tensor(c, dtype=torch.float32) for c in (self.mean, self.std))
        normalized = (tensor - mean[:, None, None]) / std[:, None, None]
        return F.pad(normalized, (0, self.size - width, 0, self.size - height))[None]

    def to_frame(self, points: Points, size: Size) -> Points:
        """Points (..., 2), (x, y) in pixels of an image of height and width `size`, in the frame.

        Boxes (..., 4) are two such points, reshaped.
        """
        resized = self.resized(size)
        scale = np.array([resized[1] / size[1], resized[0] / size[0]])
        scaled: Points = (points * scale).astype(np.float32)
        return scaled

    def from_frame(self, logits: Tensor, size: Size) -> Tensor:
        """Mask logits (N, K, h, w) of the whole frame, resized to the image, (N, K, *size)."""
        if self.keep_aspect:
            height, width = self.resized(size)
            frame = (self.size, self.size)
            logits = F.interpolate(logits, frame, mode="bilinear", align_corners=False)
            logits = logits[..., :height, :width]
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def input_size(height: int, width: int, long_side: int) -> Size:
    """Size of an image whose longer side is resized to `long_side`, rounded as SAM does."""
    scale = long_side / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)
