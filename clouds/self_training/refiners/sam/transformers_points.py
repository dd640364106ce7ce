"""SAMs of transformers that take points: SAM, SAM-HQ, SAM 2, EdgeTAM, SAM 3's tracker.

An embedding is one tensor (1, 1, V): all levels of the encoder's output, flattened and
concatenated, so that every family has the same cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clouds.self_training.refiners.sam.predictor import REGIONS_AT_ONCE_CPU
from clouds.self_training.refiners.sam.pretrained import Pretrained
from clouds.self_training.refiners.sam.prompt_decoder import Prompts

Shape = tuple[int, ...]


def level_shapes(network: Any) -> list[Shape]:
    """Shapes of the tensors that make an embedding, without the batch dimension."""
    prompts = network.config.prompt_encoder_config
    side = prompts.image_size // prompts.patch_size
    last = (prompts.hidden_size, side, side)
    decoder = network.mask_decoder
    if hasattr(decoder, "conv_s0"):  # SAM 2 and later: three levels
        fine, middle = (tuple(size) for size in network.backbone_feature_sizes[:2])
        shapes = (decoder.conv_s0.out_channels, *fine), (decoder.conv_s1.out_channels, *middle)
        return [*shapes, last]
    if hasattr(decoder, "compress_vit_conv1"):  # SAM-HQ: features of an early layer, (s, s, C)
        return [last, (side, side, network.config.vision_config.hidden_size)]
    return [last]


class TransformersEmbedder:
    """The image encoder of a model: an `Embed`."""

    def __init__(self, model: Pretrained) -> None:
        self.network, self.frame = model.network, model.frame
        self.device = model.network.device
        self.num_values = sum(map(math.prod, level_shapes(model.network)))

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings, float32 (1, 1, V), of images, uint8 (3, H, W) RGB, one after the other."""
        self.network.vision_encoder.to(self.device)  # does not copy if it is there
        return [self._embed(image) for image in images]

    def _embed(self, image: Tensor) -> Tensor:
        found = self.network.get_image_embeddings(self.frame.pixel_values(image, self.device))
        if isinstance(found, tuple):  # SAM-HQ, whose decoder reads the first of its second list
            found = [found[0], found[1][0]]
        levels = [found] if isinstance(found, Tensor) else found
        embedding = torch.cat([level.flatten().float() for level in levels])[None, None]
        assert embedding.shape[-1] == self.num_values, (embedding.shape, self.num_values)
        return embedding


class TransformersDecoder:
    """Prompt encoder and mask decoder of a model: a `PromptDecoder`."""

    def __init__(self, model: Pretrained) -> None:
        self.network, self.frame = model.network, model.frame
        self.at_once_cpu = REGIONS_AT_ONCE_CPU
        self.shapes = level_shapes(model.network)

    @torch.no_grad()
    def decode(
        self, embedding: Tensor, prompts: Prompts, multimask: bool, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `PromptDecoder`."""
        given = {"input_points": prompts.points}
        if prompts.boxes is not None:
            given["input_boxes"] = prompts.boxes
        inputs = {k: torch.from_numpy(v).to(embedding.device)[None] for k, v in given.items()}
        levels = self._levels(embedding)
        if masks is not None:  # there is one mask prompt per image: each prompt becomes an image
            inputs = {name: value.transpose(0, 1) for name, value in inputs.items()}
            inputs["input_masks"] = masks
            levels = [level.expand(len(masks), *level.shape[1:]) for level in levels]
        points = inputs["input_points"]
        inputs["input_labels"] = torch.ones(points.shape[:3], dtype=torch.int, device=points.device)
        out = self.network(**_named(levels), **inputs, multimask_output=multimask)
        return out.pred_masks.flatten(0, 1), out.iou_scores.flatten(0, 1)

    def _levels(self, embedding: Tensor) -> list[Tensor]:
        """Views of an embedding, (1, *shape) each."""
        parts = torch.split(embedding.float().flatten(), [math.prod(s) for s in self.shapes])
        return [part.view(1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _named(levels: list[Tensor]) -> dict[str, Any]:
    """Levels of an embedding as arguments of the network."""
    if len(levels) == 1:
        return {"image_embeddings": levels[0]}
    if len(levels) == 2:
        return {"image_embeddings": levels[0], "intermediate_embeddings": [levels[1]]}
    return {"image_embeddings": levels}
