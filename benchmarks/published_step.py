"""The training step of the published code, composed of library calls.

The network is open_clip's trunk and transformers' Mask2Former in float32; SAM is
segment_anything's predictor. The order and the number of operations are those of the published
code: a backbone pass for the student's views and another for the clean ones, all ten predictions of
the teacher, an image embedding in each step, classes and masks one at a time in numpy, an
assignment for each prediction and image, one parameter group per parameter.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.d2 import CfgNode
from clouds.data.structures import Domain, masks_from_label
from clouds.engine.optimizer import parameter_groups

sys.path.insert(0, str(Path(__file__).parent))
from part_clock import PartClock
from profiler import BACKWARD, OPTIMIZER, REFINER, TEACHER
from sam_refiner import large_components

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from transformers_weights import (
    mask2former,
    mask2former_config,
    mask_decoder_weights,
    pixel_decoder_weights,
)

BACKBONE, HEAD, LOSSES = "backbone", "head, forward", "matching and losses"

Labels = npt.NDArray[np.uint8]
Sample = Mapping[str, Any]


class PublishedHead(nn.Module):
    """transformers' pixel decoder and transformer module, and a linear classifier of queries.

    Args:
        cfg: has the sizes.
        widths: channels of res2 to res5.
    """

    def __init__(self, cfg: CfgNode, widths: Sequence[int]) -> None:
        super().__init__()
        config = sizes(cfg)
        self.pixel_decoder: Any = mask2former().Mask2FormerPixelDecoder(config, list(widths))
        self.predictor: Any = mask2former().Mask2FormerTransformerModule(
            config.feature_size, config
        )
        self.class_embed = nn.Linear(config.hidden_dim, config.num_labels + 1)

    def load_weights(self, ours: Any) -> None:
        """Load those of a `CLOUDSHead` with a linear class head."""
        self.pixel_decoder.load_state_dict(pixel_decoder_weights(ours.pixel_decoder.state_dict()))
        self.predictor.load_state_dict(mask_decoder_weights(ours.predictor.state_dict()))
        self.class_embed.load_state_dict(ours.predictor.class_embed.state_dict())

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits (N, Q, C + 1) and mask logits (N, Q, h, w) of every prediction."""
        pixel = self.pixel_decoder(features, return_dict=True)
        out = self.predictor(pixel.multi_scale_features, pixel.mask_features)
        classes = [self.class_embed(s.transpose(0, 1)) for s in out.intermediate_hidden_states]
        return classes, list(out.masks_queries_logits)


def sizes(cfg: CfgNode) -> Any:
    """transformers' configuration of the same head and the same losses."""
    head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    return mask2former_config(
        num_labels=head.NUM_CLASSES,
        feature_size=head.CONVS_DIM,
        mask_feature_size=head.MASK_DIM,
        encoder_layers=head.TRANSFORMER_ENC_LAYERS,
        encoder_feedforward_dim=head.TRANSFORMER_ENC_DIM_FEEDFORWARD,
        hidden_dim=former.HIDDEN_DIM,
        num_queries=former.NUM_OBJECT_QUERIES,
        num_attention_heads=former.NHEADS,
        dropout=former.DROPOUT,
        dim_feedforward=former.DIM_FEEDFORWARD,
        decoder_layers=former.DEC_LAYERS,
        no_object_weight=former.NO_OBJECT_WEIGHT,
        class_weight=former.CLASS_WEIGHT,
        mask_weight=former.MASK_WEIGHT,
        dice_weight=former.DICE_WEIGHT,
        train_num_points=former.TRAIN_NUM_POINTS,
        oversample_ratio=former.OVERSAMPLE_RATIO,
        importance_sample_ratio=former.IMPORTANCE_SAMPLE_RATIO,
    )


class PublishedLosses:
    """transformers' matching and losses of all predictions.

    Args:
        cfg: has the weights and sizes.
        device: of the predictions.
    """

    def __init__(self, cfg: CfgNode, device: torch.device) -> None:
        former = cfg.MODEL.MASK_FORMER
        self.weights = {
            "cross_entropy": former.CLASS_WEIGHT,
            "mask": former.MASK_WEIGHT,
            "dice": former.DICE_WEIGHT,
        }
        self.criterion = mask2former().Mask2FormerLoss(sizes(cfg), self.weights).to(device)

    def __call__(
        self,
        class_logits: list[Tensor],
        mask_logits: list[Tensor],
        targets: Sequence[tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """Weighted losses by our names.

        Args:
            class_logits: (N, Q, C + 1) of every prediction.
            mask_logits: (N, Q, h, w) of every prediction.
            targets: classes (K,) and masks, float (K, H, W), of each image.
        """
        earlier = [
            {"class_queries_logits": classes, "masks_queries_logits": masks}
            for classes, masks in zip(class_logits[:-1], mask_logits[:-1], strict=True)
        ]
        labels, masks = zip(*targets, strict=True)
        by_name = self.criterion(
            mask_logits[-1], class_logits[-1], list(masks), list(labels), earlier
        )
        losses = {}
        for name, loss in by_name.items():
            kind = next(kind for kind in self.weights if f"loss_{kind}" in name)
            losses[name.replace("cross_entropy", "ce")] = self.weights[kind] * loss
        return losses


def with_masks(sample: Sample) -> Sample:
    """A labelled sample of the published loader: with a mask of each class."""
    target = masks_from_label(sample["sem_seg"])
    return {**sample, "labels": target.labels, "masks": target.masks}


def labelled_target(sample: Sample, device: torch.device) -> tuple[Tensor, Tensor]:
    """Classes (K,) and masks, float (K, H, W), of a sample of `with_masks`."""
    return sample["labels"].to(device), sample["masks"].to(device).float()


def adamw_of(cfg: CfgNode, network: nn.Module) -> torch.optim.AdamW:
    """AdamW with a group for each parameter that trains."""
    groups = [
        {"params": [p], "lr": group["lr"], "weight_decay": group["weight_decay"]}
        for group in parameter_groups(cfg, network)
        for p in group["params"]
    ]
    return torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, foreach=False)


class PublishedStep:
    """Forward, backward, clip, step.

    Args:
        cfg: of the model.
        model: ours, whose weights are copied. Its backbone must be a ConvNeXt.
        sam: of `build_sam`; None: labelled images only.
        given: label maps that are refined instead of the teacher's, one for each generated image
            of a batch, in order; None: the teacher's.
    """

    def __init__(
        self, cfg: CfgNode, model: Any, sam: Any = None, given: Sequence[Labels] | None = None
    ) -> None:
        clip = model.backbone
        if not clip.is_convnext:
            raise ValueError(
                f"{clip.model_name}: the published step is implemented for ConvNeXt only"
            )
        self.cfg, self.device, self.sam, self.given = cfg, model.device, sam, given
        self.mean, self.std = model.pixel_mean.clone(), model.pixel_std.clone()
        self.trunk = copy.deepcopy(clip.clip_model.visual.trunk)
        self.trunk.to(memory_format=torch.contiguous_format).requires_grad_(False).eval()
        widths = [info["num_chs"] for info in self.trunk.feature_info]
        # Without dropout, only transformers' check for overflow depends on the mode.
        self.head = PublishedHead(cfg, widths).to(self.device).eval()
        self.head.load_weights(model.sem_seg_head)
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        self.losses = PublishedLosses(cfg, self.device)
        self.optimizer = adamw_of(cfg, self.head)

    def loaded(self, batch: Sequence[Sample]) -> list[Sample]:
        """The batch of the published loader, with a mask per class of each labelled image."""
        return [with_masks(sample) if "sem_seg" in sample else sample for sample in batch]

    def __call__(self, batch: Sequence[Sample], clock: PartClock) -> dict[str, float]:
        """Train on a batch of `loaded`; returns the weighted losses."""
        with clock.part(BACKBONE):
            features = self.features([sample["image"] for sample in batch])
        generated = [sample for sample in batch if sample["domain"] == Domain.GENERATED]
        pseudo = self.pseudo_targets(generated, clock)
        targets = [
            next(pseudo)
            if sample["domain"] == Domain.GENERATED
            else labelled_target(sample, self.device)
            for sample in batch
        ]
        with clock.part(HEAD):
            class_logits, mask_logits = self.head(features)
        with clock.part(LOSSES):
            losses = self.losses(class_logits, mask_logits, targets)
        with clock.part(BACKWARD):
            self.optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
        with clock.part(OPTIMIZER):
            bound = self.cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE
            nn.utils.clip_grad_norm_(self.head.parameters(), bound, foreach=False)
            self.optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    @torch.no_grad()
    def features(self, images: Sequence[Tensor]) -> list[Tensor]:
        """res2 to res5 of images uint8 (3, H, W) of one size."""
        views = [(image.to(self.device) - self.mean) / self.std for image in images]
        x = self.trunk.stem(torch.stack(views))
        features = []
        for stage in self.trunk.stages:
            x = stage(x)
            features.append(x.contiguous())
        self.trunk.norm_pre(x)
        return features

    # ------------------------------------------------------------ pseudo-labels

    @torch.no_grad()
    def pseudo_targets(
        self, generated: Sequence[Sample], clock: PartClock
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Classes (K,) and masks, float (K, H, W), of each generated image."""
        if not generated:
            return iter(())
        images = [sample["clean_image"] for sample in generated]
        with clock.part(BACKBONE):
            features = self.features(images)
        with clock.part(TEACHER):
            maps = self.predict_labels(features, images[0].shape[-2:])
        if self.given is not None:
            maps = list(self.given)
        seeds = [sample["seed"] for sample in generated]
        with clock.part(REFINER):
            return iter(
                [self.refine(*one) for one in zip(images, maps, seeds, strict=True)],
            )

    def predict_labels(self, features: Sequence[Tensor], size: tuple[int, int]) -> list[Labels]:
        """Best class of each pixel: all masks at full size, summed by class."""
        class_logits, mask_logits = self.teacher(features)
        masks = F.interpolate(mask_logits[-1], size, mode="bilinear", align_corners=False)
        maps = []
        for classes, mask in zip(class_logits[-1], masks, strict=True):
            scores = torch.einsum("qc,qhw->chw", classes.softmax(-1)[:, :-1], mask.sigmoid())
            maps.append(scores.argmax(0).cpu().numpy().astype(np.uint8))
        return maps

    @torch.no_grad()
    def refine(self, image: Tensor, classes: Labels, seed: int) -> tuple[Tensor, Tensor]:
        """SAM's best mask for points of each large component, merged to one mask per class."""
        from segment_anything import SamPredictor

        node = self.cfg.MODEL.CLOUDS.SAM
        components = large_components(classes, node.SIZE_THRESHOLD)
        if not components:
            raise ValueError(f"no component is larger than {node.SIZE_THRESHOLD} pixels")
        rng = np.random.default_rng(seed)
        points = []
        for _, mask in components:
            pixels = np.argwhere(mask)
            rows = rng.choice(len(pixels), node.NUM_POINTS, replace=False)
            points.append(pixels[rows][:, ::-1])
        predictor = SamPredictor(self.sam)
        resized = torch.from_numpy(predictor.transform.apply_image(image.permute(1, 2, 0).numpy()))
        resized = resized.to(self.device).permute(2, 0, 1).contiguous()
        predictor.set_torch_image(resized[None], classes.shape)
        positions = predictor.transform.apply_coords(np.stack(points), classes.shape)
        masks, ious, _ = predictor.predict_torch(
            torch.from_numpy(positions).float().to(self.device),
            torch.ones(len(points), node.NUM_POINTS, device=self.device),
        )
        best = masks[torch.arange(len(masks)), ious.argmax(1).cpu()]
        best = best & ~(best.sum(0) > 1)
        classes_of_masks = torch.tensor([label for label, _ in components])
        labels = classes_of_masks.unique()
        unions = [best[classes_of_masks == label].any(0) for label in labels]
        return labels.to(self.device), torch.stack(unions).float()
