"""Prompt encoder and mask decoder of a small SAM: convolutions on maps of similarity to the points.

SAM's transformer learns where a point is, and what is like it, from many millions of masks. Here
both are computed: how similar a pixel's embedding is to those at the points, and how far it is from
them. Convolutions turn these maps into masks. The interface is that of segment_anything's
`PromptEncoder` and `MaskDecoder`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.ops.in_cache import in_cache
from clouds.self_training.refiners.sam.conv_encoder import FINE, content_size

FOREGROUND, PADDING, TOP_LEFT, BOTTOM_RIGHT = 1, -1, 2, 3
"""Labels of points; boxes are two points, as segment_anything's."""
SCALES = (0.03, 0.12)
"""Standard deviations of the Gaussians around points, in units of half the frame."""
NUM_MASKS = 4
"""One for `multimask_output` False, then three."""


class CoordinateEncoder(nn.Module):
    """Prompts as coordinates, without weights.

    Args:
        embed_dim: channels of the image embedding.
        cells: its height and width.
        side: height and width of the frame, pixels.
    """

    def __init__(self, embed_dim: int, cells: int, side: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_embedding_size = (cells, cells)
        self.input_image_size = (side, side)
        self.mask_input_size = (FINE * cells, FINE * cells)
        size = FINE * cells
        steps = (torch.arange(size) + 0.5) * (2 / size) - 1
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        self.register_buffer("grid", torch.stack((columns, rows))[None], persistent=False)

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Coordinates of prompts and their mask.

        Args:
            points: (N, P, 2), (x, y) in the frame, and their labels (N, P), 1 or -1 (padding).
            boxes: (N, 4), left, top, right, bottom in the frame.
            masks: logits (N, 1, 4s, 4s).

        Returns:
            (N, P + 2, 3): x, y from -1 to 1, and label; the last two are the corners of the box,
            padding without one. (N, 2, 4s, 4s): the mask from -1 to 1, and whether there is one.

        Raises:
            ValueError: no points, or background points.
        """
        if points is None or not points[0].shape[1]:
            raise ValueError("this SAM needs foreground points; there are none")
        coordinates, labels = points
        if bool(((labels != FOREGROUND) & (labels != PADDING)).any()):
            raise ValueError(
                "this SAM takes foreground points (label 1) alone, not background points (0)"
            )
        count = len(coordinates)
        corners = coordinates.new_zeros(count, 2, 2) if boxes is None else boxes.view(-1, 2, 2)
        kinds = (PADDING, PADDING) if boxes is None else (TOP_LEFT, BOTTOM_RIGHT)
        corner_labels = labels.new_tensor(kinds).expand(count, 2)
        xy = torch.cat((coordinates, corners), 1)
        xy = (xy + 0.5) * (2 / self.input_image_size[0]) - 1
        sparse = torch.cat((xy, torch.cat((labels, corner_labels), 1)[..., None]), -1)
        if masks is None:
            dense = coordinates.new_zeros(count, 2, *self.mask_input_size)
        else:
            bounded = (masks / 4).tanh()
            dense = torch.cat((bounded, torch.ones_like(bounded)), 1)
        return sparse, dense

    def get_dense_pe(self) -> Tensor:
        """(1, 2, 4s, 4s): x, y of pixels, from -1 to 1."""
        grid: Tensor = self.grid  # type: ignore[assignment]
        return grid


class Points(NamedTuple):
    """Points (N, P, 2) of N prompts, x, y from -1 to 1.

    Attributes:
        in_frame: in the whole frame.
        in_content: in its part that is no padding.
        valid: bool (N, P); others are left out.
    """

    in_frame: Tensor
    in_content: Tensor
    valid: Tensor


class SimilarityDecoder(nn.Module):
    """Masks from similarity and distance to the points.

    Args:
        coarse, fine: channels of the image embedding, see `ConvEncoder`.
        dim: channels of the convolutions at the embedding's resolution.
        fine_dim: of those at four times that.
    """

    def __init__(self, coarse: int, fine: int, dim: int = 32, fine_dim: int = 16) -> None:
        super().__init__()
        self.num_coarse = coarse
        maps = 2 + 2 + len(SCALES) + 1 + 2  # similarities, distance, box, mask
        self.context = nn.Conv2d(coarse, 16, 1)
        self.coarse = nn.Sequential(
            nn.Conv2d(maps + 16, dim, 3, padding=1), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=2, dilation=2), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=4, dilation=4), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.pooled = nn.Linear(dim, dim)
        self.up = nn.Conv2d(dim, fine_dim - (maps - 2), 1)
        # on the maps of each prompt, and on the image's features once for all prompts
        self.from_maps = nn.Conv2d(fine_dim, fine_dim, 3, padding=1)
        self.from_image = nn.Conv2d(fine, fine_dim, 3, padding=1)
        self.fine = nn.Sequential(
            nn.ReLU(inplace=True), nn.Conv2d(fine_dim, fine_dim, 3, padding=2, dilation=2),
            nn.ReLU(inplace=True), nn.Conv2d(fine_dim, NUM_MASKS, 1),
        )  # fmt: skip
        self.iou = nn.Sequential(nn.Linear(2 * dim + 3, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Mask logits (N, 3, 4s, 4s) and predicted IoUs (N, 3); (N, 1, …) without `multimask`."""
        logits, ious = self.predict_masks(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings
        )
        kept = slice(1, None) if multimask_output else slice(0, 1)
        return logits[:, kept], ious[:, kept]

    def predict_masks(
        self, embedding: Tensor, positions: Tensor, prompts: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, 4, 4s, 4s) of all four masks, and predicted IoUs (N, 4), of one image.

        Where the embedding is that of padding, nothing is computed; logits are those of the nearest
        pixel that is not.

        Args:
            embedding: (1, C, s, s).
            positions, prompts, masks: from `CoordinateEncoder`.
        """
        size = embedding.shape[-1]
        rows, columns = content_size(embedding)
        embedding = embedding[..., :rows, :columns]
        positions, masks = (
            each[..., : FINE * rows, : FINE * columns] for each in (positions, masks)
        )
        given = prompts[:, :-2]  # without the corners of the box
        in_frame, sides = given[..., :2], prompts.new_tensor((columns, rows))
        in_content = (in_frame + 1) * (size / sides) - 1
        points = Points(in_frame, in_content, given[..., 2] == FOREGROUND)
        features, logits = self._decode(embedding, positions, points, prompts, masks)
        ious = self._ious(logits.detach(), features)
        missing = [FINE * (size - side) for side in (columns, rows)]
        return F.pad(logits, (0, missing[0], 0, missing[1]), mode="replicate"), ious

    def _decode(
        self, embedding: Tensor, positions: Tensor, points: Points, prompts: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of every prompt at the embedding's resolution, and logits of its masks."""
        coarse, stacked = embedding[:, : self.num_coarse], embedding[:, self.num_coarse :]
        fine = F.pixel_shuffle(stacked, FINE)
        near = gaussians(positions[0], points.in_frame, points.valid)
        similar = similarities(fine, points.in_content, points.valid)
        fine_maps = torch.cat((similar, near, _box(positions[0], prompts), masks), 1)
        pooled_maps = F.avg_pool2d(fine_maps, FINE)
        context = self.context(coarse).expand(len(prompts), -1, -1, -1)
        similar = similarities(coarse, points.in_content, points.valid)
        features = self.coarse(torch.cat((similar, pooled_maps, context), 1))
        features = features + self.pooled(features.mean((2, 3)))[..., None, None]
        from_image = self.from_image(fine)

        def logits_of(features: Tensor, fine_maps: Tensor) -> Tensor:
            upscaled = F.interpolate(features, scale_factor=FINE, mode="bilinear")
            maps: Tensor = self.from_maps(torch.cat((upscaled, fine_maps), 1))
            logits: Tensor = self.fine(maps.add_(from_image))
            return logits

        return features, in_cache(logits_of, self.up(features), fine_maps)

    def _ious(self, logits: Tensor, features: Tensor) -> Tensor:
        """Predicted IoUs (N, 4), from the features in each mask and overall, the mask's area, its
        stability score (as segment_anything's, logits at 1 and -1), and its mean p (1 - p).
        """
        inside = F.avg_pool2d(logits.sigmoid(), FINE).flatten(2)  # (N, 4, s * s)
        area = inside.sum(-1, keepdim=True)
        values = features.flatten(2).transpose(1, 2)
        means = inside @ values / area.clamp(min=1e-3)
        overall = values.mean(1, keepdim=True).expand_as(means)
        high = (logits > 1).flatten(2).float().sum(-1, keepdim=True)
        low = (logits > -1).flatten(2).float().sum(-1, keepdim=True)
        numbers = torch.cat((area.clamp(min=1e-3).log(), high / low.clamp(min=1)), -1)
        variance = (inside * (1 - inside)).sum(-1, keepdim=True) / area.clamp(min=1e-3)
        predicted: Tensor = self.iou(torch.cat((means, overall, numbers, variance), -1))
        return predicted.squeeze(-1).sigmoid()


def similarities(image: Tensor, points: Tensor, is_point: Tensor) -> Tensor:
    """(N, 2, h, w): mean and largest cosine similarity of pixels with the points of each prompt.

    Args:
        image: features (1, C, h, w).
        points: (N, P, 2), x, y from -1 to 1.
        is_point: bool (N, P); others are left out.
    """
    normalized = F.normalize(image, dim=1)
    at_points = F.grid_sample(normalized, points[None], align_corners=False)[0]  # (C, N, P)
    at_points = F.normalize(at_points, dim=0).permute(1, 2, 0)
    cosines = at_points @ normalized[0].flatten(1)  # (N, P, h * w)
    valid = is_point[..., None]
    mean = (cosines * valid).sum(1) / valid.sum(1).clamp(min=1)
    largest = cosines.masked_fill(~valid, -1.0).amax(1)
    return torch.stack((mean, largest), 1).view(len(points), 2, *image.shape[2:])


def gaussians(positions: Tensor, points: Tensor, is_point: Tensor) -> Tensor:
    """(N, len(SCALES), h, w): Gaussians of `SCALES` of the distance to the nearest point.

    Args:
        positions: (2, h, w), x, y of pixels from -1 to 1.
        points, is_point: see `similarities`.
    """

    def of_prompts(points: Tensor, is_point: Tensor) -> Tensor:
        squares = [
            (axis.flatten() - points[..., i, None]).square() for i, axis in enumerate(positions)
        ]
        distances = (squares[0] + squares[1]).masked_fill(~is_point[..., None], 8.0).amin(1)
        return torch.stack([(-distances / (2 * scale**2)).exp() for scale in SCALES], 1)

    found = in_cache(of_prompts, points, is_point)
    return found.view(len(points), len(SCALES), *positions.shape[1:])


def _box(positions: Tensor, prompts: Tensor) -> Tensor:
    """(N, 1, h, w): 1 in the box, -1 outside of it, 0 without one."""
    low, high = prompts[:, -2, :, None, None], prompts[:, -1, :, None, None]
    inside = ((positions >= low[:, :2]) & (positions <= high[:, :2])).all(1)
    given = low[:, 2] == TOP_LEFT
    return (torch.where(inside, 1.0, -1.0) * given)[:, None]
