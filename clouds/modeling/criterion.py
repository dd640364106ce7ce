"""The losses of a set of class and mask predictions (Mask2Former, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from clouds.comm import mean_over_ranks
from clouds.d2 import CfgNode
from clouds.data.structures import Targets
from clouds.modeling.matcher import CostWeights, Match, MatchedPairs, match, matching_costs
from clouds.modeling.points import (
    Generator,
    PointSampler,
    SampledPoints,
    mask_losses,
    point_sample,
    sample_weights,
)
from clouds.modeling.transformer_decoder.decoder import Predictions


@dataclass(frozen=True)
class MatchedBatch:
    """Predictions of N images, matched with their targets.

    Attributes:
        class_logits: (L, N, Q, C + 1), of the supervised predictions.
        points: of each image.
        masks: of each image's targets, (K, H, W), times the pixel weights.
        pairs: the matched pairs.
        query_weights: (L, N * Q), of each query in the class loss.
        totals: of these images.
    """

    class_logits: Tensor
    points: list[SampledPoints]
    masks: list[Tensor]
    pairs: MatchedPairs
    query_weights: Tensor
    totals: BatchTotals


@dataclass(frozen=True)
class BatchTotals:
    """What the normalizers of the losses of L predictions are computed from, for a set of images.

    Totals of several sets add up to those of all their images.

    Attributes:
        matched: number of matched queries.
        unmatched: (L,), number of unmatched queries, counted as `Targets.no_object_weight` says.
    """

    matched: int
    unmatched: Tensor

    def __add__(self, other: BatchTotals) -> BatchTotals:
        return BatchTotals(self.matched + other.matched, self.unmatched + other.unmatched)


@dataclass(frozen=True)
class Normalizers:
    """What sums of losses over a batch are divided by.

    Attributes:
        masks: (), of the losses of masks.
        classes: (L,), of the class losses of each prediction.
    """

    masks: Tensor
    classes: Tensor


@dataclass(frozen=True)
class BatchPart:
    """What the losses of a part of a batch are computed from, beside its samples.

    The losses of all parts, with the normalizers of the whole batch, add up to those of the batch.

    Attributes:
        targets: one per sample of the part.
        normalizers: of the whole batch.
    """

    targets: Sequence[Targets]
    normalizers: Normalizers


class SetCriterion(nn.Module):
    """Hungarian matching of queries and targets, and class, mask and dice losses of the pairs.

    Pixel weights (`Targets.weights`) apply to the mask losses and to the mask terms of matching,
    see `clouds.modeling.points`. They do not apply to the class loss: an unmatched query should
    predict no_object even if its mask covers only pixels of weight 0, and every target is matched,
    even if all its pixels have weight 0. `Targets.no_object_weight` applies to the class loss of
    unmatched queries, `Targets.class_weight` to that of all queries of an image, and
    `Targets.dice_weight` to the dice loss, but not to the dice term of matching.

    Args:
        num_classes: without no_object.
        weights: of the losses, and of the same terms in matching.
        no_object_weight: weight of no_object in the class loss.
        sampler: of the points at which masks are compared.
        deep_supervision: losses of every layer's prediction, not of the last only.
        normalize_class_loss_over: 'batch' or 'rank', see MODEL.MASK_FORMER.CLASS_NORMALIZER.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        weights: CostWeights,
        no_object_weight: float,
        sampler: PointSampler,
        deep_supervision: bool = True,
        normalize_class_loss_over: str = "batch",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weights = weights
        self.sampler = sampler
        self.deep_supervision = deep_supervision
        self.normalize_class_loss_over = normalize_class_loss_over
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SetCriterion:
        """From MODEL.MASK_FORMER."""
        former = cfg.MODEL.MASK_FORMER
        return cls(
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            weights=CostWeights(former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT),
            no_object_weight=former.NO_OBJECT_WEIGHT,
            sampler=PointSampler(
                former.TRAIN_NUM_POINTS, former.OVERSAMPLE_RATIO, former.IMPORTANCE_SAMPLE_RATIO
            ),
            deep_supervision=former.DEEP_SUPERVISION,
            normalize_class_loss_over=former.CLASS_NORMALIZER,
        )

    def forward(
        self,
        predictions: Predictions,
        targets: Sequence[Targets],
        seeds: Sequence[int] | None = None,
        normalizers: Normalizers | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: of N images; masks at any resolution.
            targets: of the same images; their masks have the size of the padded image.
            seeds: one per image, for sampling its points; None: torch's global generator.
            normalizers: of a batch of which these images are a part, whose losses are summed; None:
                these images are the batch.

        Returns:
            weighted losses, scalars: `loss_ce`, `loss_mask`, `loss_dice` of the last prediction,
            `loss_ce_0`, … of the earlier ones (0: of the initial queries).
        """
        with torch.autocast(predictions.mask_logits[0].device.type, enabled=False):
            return self.losses(predictions, targets, seeds, normalizers)

    def totals(
        self, predictions: Predictions, targets: Sequence[Targets], seeds: Sequence[int] | None
    ) -> BatchTotals:
        """What `forward` would compute the normalizers of these images from; no gradient flows."""
        with torch.no_grad(), torch.autocast(predictions.mask_logits[0].device.type, enabled=False):
            return self._matched(predictions, targets, seeds).totals

    def totals_of_targets(
        self, targets: Sequence[Targets], num_predictions: int, num_queries: int
    ) -> BatchTotals | None:
        """`totals` of `num_predictions` predictions, without them.

        None: `Targets.no_object_weight` has a value per pixel, so predictions are needed.
        """
        matched, unmatched = 0, 0.0
        for target in targets:
            if isinstance(target.no_object_weight, Tensor):
                return None
            count = min(len(target.labels), num_queries)
            matched += count
            unmatched += (num_queries - count) * target.no_object_weight
        num_layers = len(self._supervised_layers(num_predictions))
        return BatchTotals(matched, self.empty_weight.new_full((num_layers,), unmatched))

    def losses(
        self,
        predictions: Predictions,
        targets: Sequence[Targets],
        seeds: Sequence[int] | None = None,
        normalizers: Normalizers | None = None,
    ) -> dict[str, Tensor]:
        """`forward` on a device without autocast, such as the meta device, too."""
        layers = self._supervised_layers(len(predictions.class_logits))
        matched = self._matched(predictions, targets, seeds)
        pairs = matched.pairs
        normalizers = normalizers or self.normalizers(matched.totals)
        entropy = self._class_losses(matched.class_logits, targets, pairs, matched.query_weights)
        cross_entropy = entropy / normalizers.classes
        matched_mask_logits = predictions.matched_mask_logits(
            list(layers.values()), pairs.queries_per_image(matched.class_logits.shape[2])
        )
        sums = self._mask_losses(matched_mask_logits, targets, matched.masks, pairs, matched.points)
        bce, dice = sums / normalizers.masks
        losses = {}
        for i, suffix in enumerate(layers):
            losses["loss_ce" + suffix] = self.weights.class_weight * cross_entropy[i]
            losses["loss_mask" + suffix] = self.weights.mask_weight * bce[i]
            losses["loss_dice" + suffix] = self.weights.dice_weight * dice[i]
        return losses

    def _matched(
        self, predictions: Predictions, targets: Sequence[Targets], seeds: Sequence[int] | None
    ) -> MatchedBatch:
        """Sample points and match the supervised predictions with the targets."""
        layers = self._supervised_layers(len(predictions.class_logits))
        class_logits = torch.stack([predictions.class_logits[i].float() for i in layers.values()])
        mask_logits = [predictions.mask_logits[i].float() for i in layers.values()]
        device, num_queries = class_logits.device, class_logits.shape[2]
        counts = [min(len(t.labels), num_queries) for t in targets]
        generators: list[Generator] = [None] * len(targets)
        if seeds is not None:
            generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        points = self.sampler.sample(len(layers), counts, generators, device)
        masks = [_weighted_masks(t) for t in targets]
        matches = self._match(class_logits, mask_logits, targets, masks, points)
        pairs = MatchedPairs.from_matches(matches, num_queries, device)
        no_object = _query_weights([t.no_object_weight for t in targets], mask_logits)
        unmatched = no_object.scatter(1, pairs.queries, 0.0).sum(1)
        totals = BatchTotals(sum(counts), unmatched)
        query_weights = _query_weights([t.class_weight for t in targets], mask_logits)
        query_weights *= no_object.scatter(1, pairs.queries, 1.0)
        return MatchedBatch(class_logits, points, masks, pairs, query_weights, totals)

    def _supervised_layers(self, num_predictions: int) -> dict[str, int]:
        """Loss suffix -> prediction, the last first: the order in which points are sampled."""
        layers = {"": num_predictions - 1}
        if self.deep_supervision:
            layers |= {f"_{i}": i for i in range(num_predictions - 1)}
        return layers

    @torch.no_grad()
    def _match(
        self,
        class_logits: Tensor,
        mask_logits: list[Tensor],
        targets: Sequence[Targets],
        masks: list[Tensor],
        points: list[SampledPoints],
    ) -> list[list[Match]]:
        """Per prediction, per image.

        class_logits (L, N, Q, C + 1); mask_logits: L tensors (N, Q, h, w); masks: per image
        (K, H, W), times the pixel weights.
        """
        matching_points = torch.stack([p.matching for p in points])  # (N, L, P, 2)
        n, num_predictions, num_points, _ = matching_points.shape
        sampled = [
            point_sample(m[None], p.reshape(1, -1, 2))[0]
            for m, p in zip(masks, matching_points, strict=True)
        ]
        target_masks = pad_sequence(sampled, batch_first=True)  # (N, K, L * P)
        target_masks = target_masks.view(n, -1, num_predictions, num_points)
        labels = pad_sequence([t.labels for t in targets], batch_first=True)
        weights = _matching_weights(targets, matching_points)
        # Image by image on a CPU, as the tensors of one image fit into its cache.
        chunks = [slice(i, i + 1) for i in range(n)] if matching_points.is_cpu else [slice(n)]
        costs = [
            torch.cat(
                [
                    matching_costs(
                        class_logits[i, chunk],
                        point_sample(mask_logits[i][chunk], matching_points[chunk, i]),
                        labels[chunk],
                        target_masks[chunk, :, i],
                        self.weights,
                        weights[chunk, i],
                    )
                    for chunk in chunks
                ]
            )
            for i in range(num_predictions)
        ]
        return match(torch.stack(costs), [len(t.labels) for t in targets])

    def normalizers(self, totals: BatchTotals) -> Normalizers:
        """Number of matched masks, and total weights in the class losses, means over ranks.

        DistributedDataParallel averages gradients over ranks, so these averages make the sum over
        all ranks a mean over the whole batch. A collective operation.
        """
        weight = totals.matched + totals.unmatched * self.empty_weight[-1]
        own = torch.cat([weight.new_full((1,), float(totals.matched)), weight])
        averages = mean_over_ranks(own)
        classes = (averages if self.normalize_class_loss_over == "batch" else own)[1:]
        # 0 if no query of the batch counts; the class loss is then 0, too
        smallest = torch.finfo(classes.dtype).eps
        return Normalizers(averages[0].clamp(min=1), classes.clamp(min=smallest))

    def _class_losses(
        self,
        logits: Tensor,
        targets: Sequence[Targets],
        pairs: MatchedPairs,
        query_weights: Tensor,
    ) -> Tensor:
        """Weighted sums of the cross-entropies of all queries, (L, N, Q, C + 1) -> (L,).

        query_weights: (L, N * Q).
        """
        num_predictions, n, num_queries, _ = logits.shape
        labels = [t.labels[index] for t, index in zip(targets, pairs.targets, strict=True)]
        target_classes = torch.full(
            (num_predictions, n * num_queries), self.num_classes, device=logits.device
        )
        target_classes.scatter_(1, pairs.queries, torch.cat(labels, dim=1))
        entropy = F.cross_entropy(
            logits.flatten(0, 2), target_classes.flatten(), self.empty_weight, reduction="none"
        )
        return (entropy.view(num_predictions, -1) * query_weights).sum(1)

    def _mask_losses(
        self,
        matched_mask_logits: Sequence[Tensor],
        targets: Sequence[Targets],
        masks: list[Tensor],
        pairs: MatchedPairs,
        points: list[SampledPoints],
    ) -> Tensor:
        """Sums over the matched masks of binary cross-entropy and of dice loss: (2, L).

        Per image matched_mask_logits (L, m, h, w); masks (K, H, W), times the pixel weights.
        """
        if not sum(pairs.counts):  # only no_object: a loss of 0 with a gradient of 0
            zeros = torch.stack([m.flatten(1).sum(1) for m in matched_mask_logits]).sum(0)
            return zeros.expand(2, -1)
        losses = []
        for i, (logits, target) in enumerate(zip(matched_mask_logits, targets, strict=True)):
            logits = logits.float()
            selected = self.sampler.select_uncertain(logits, points[i], target.weights)
            image_losses = mask_losses(
                point_sample(logits.flatten(0, 1)[:, None], selected)[:, 0],
                _sample_matched(masks[i], selected, pairs.targets[i], pairs.by_target[i]),
                None if target.weights is None else sample_weights(target.weights, selected),
            )
            bce, dice = image_losses.view(2, *pairs.targets[i].shape).sum(2)
            losses.append(torch.stack((bce, target.dice_weight * dice)))
        return torch.stack(losses).sum(0)


@torch.no_grad()
def _sample_matched(masks: Tensor, points: Tensor, targets: Tensor, by_target: Tensor) -> Tensor:
    """Masks of targets (L, m) among (K, H, W) at points (L * m, P, 2) of each: (L * m, P)."""
    num_predictions, num_matched = targets.shape
    if num_matched < len(masks):  # more targets than queries: each prediction has other pairs
        return point_sample(masks.index_select(0, targets.flatten())[:, None], points)[:, 0]
    # Each mask is sampled once at the points of all predictions, so no mask is copied.
    sorted_points = points.index_select(0, by_target)
    sorted_points = sorted_points.view(num_matched, num_predictions * points.shape[1], 2)
    sampled = point_sample(masks[:, None], sorted_points).view(points.shape[:2])
    return torch.empty_like(sampled).index_copy_(0, by_target, sampled)


@torch.no_grad()
def _query_weights(values: Sequence[float | Tensor], mask_logits: Sequence[Tensor]) -> Tensor:
    """Weights of the queries of all images, (L, N * Q), from a weight, or one per pixel, of each.

    mask_logits: L tensors (N, Q, h, w).
    """
    weights = mask_logits[0].new_ones(len(mask_logits), *mask_logits[0].shape[:2])
    images = zip(weights.unbind(1), values, zip(*mask_logits, strict=True), strict=True)
    for image_weights, value, masks in images:
        if isinstance(value, Tensor):
            image_weights.copy_(torch.stack([mean_over_masks(value, m) for m in masks]))
        else:
            image_weights.fill_(value)
    return weights.flatten(1)


def mean_over_masks(values: Tensor, mask_logits: Tensor) -> Tensor:
    """Means (Q,) of the values of pixels, (H, W) in [0, 1], over masks, (Q, h, w).

    A pixel counts by its mask probability. Of an empty mask it is 1. All pixels are used and not
    the points of the losses, of which a small mask has only a few: the mean would be noisy.
    """
    lost = F.interpolate(1 - values[None, None], mask_logits.shape[-2:], mode="area").flatten()
    both = torch.stack((lost, torch.ones_like(lost)), dim=1)
    lost_sum, size = (mask_logits.sigmoid().flatten(1) @ both).unbind(1)
    return 1 - (lost_sum / size.clamp(min=torch.finfo(size.dtype).eps)).clamp(max=1)


def _weighted_masks(target: Targets) -> Tensor:
    masks = target.masks.float()
    return masks if target.weights is None else masks * target.weights


def _matching_weights(targets: Sequence[Targets], points: Tensor) -> Tensor:
    """Pixel weights at points (N, L, P, 2) of all images: (N, L, P)."""
    return torch.stack(
        [
            torch.ones_like(p[..., 0]) if t.weights is None else sample_weights(t.weights, p)
            for t, p in zip(targets, points, strict=True)
        ]
    )
