"""The losses of a set of class and mask predictions (Mask2Former, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from clouds.data.targets import Targets
from clouds.engine.distributed import mean_over_ranks
from clouds.modeling.criterion.matcher import CostWeights, Match, match, matching_costs
from clouds.modeling.criterion.points import (
    Generator,
    LayerPoints,
    PointSampler,
    generators_from,
    sample_at,
)
from clouds.modeling.mask_decoder.predictions import Predictions


class SetCriterion(nn.Module):
    """Matches predictions with targets and takes class, mask and dice losses of the pairs.

    Args:
        classes: the void class not counted.
        weights: of the losses, and of the same terms in matching.
        no_object_weight: of void in the class loss.
        sampler: the points at which masks are compared.
        deep_supervision: take losses of every layer's prediction, not of the last alone.
        normalize_class_loss_over: 'batch' or 'rank', see MODEL.MASK_FORMER.CLASS_NORMALIZER.
    """

    empty_weight: Tensor

    def __init__(
        self,
        classes: int,
        weights: CostWeights,
        no_object_weight: float,
        sampler: PointSampler,
        deep_supervision: bool = True,
        normalize_class_loss_over: str = "batch",
    ) -> None:
        super().__init__()
        self.classes = classes
        self.weights = weights
        self.sampler = sampler
        self.deep_supervision = deep_supervision
        self.normalize_class_loss_over = normalize_class_loss_over
        empty_weight = torch.ones(classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    def forward(
        self,
        predictions: Predictions,
        targets: Sequence[Targets],
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: of N images; masks at any resolution.
            targets: of the same images; their masks cover the padded image.
            seeds: one per image, from which its points are drawn; None: torch's global generator.

        Returns:
            weighted losses, scalars: `loss_ce`, `loss_mask`, `loss_dice` of the last prediction,
            `loss_ce_0`, … of the earlier ones (0: of the raw queries).
        """
        with torch.autocast(predictions.mask_logits[0].device.type, enabled=False):
            return self._losses(predictions, targets, seeds)

    def _losses(
        self, predictions: Predictions, targets: Sequence[Targets], seeds: Sequence[int] | None
    ) -> dict[str, Tensor]:
        layers = self._supervised_layers(len(predictions.class_logits))
        class_logits = [predictions.class_logits[i].float() for i in layers.values()]
        mask_logits = [predictions.mask_logits[i].float() for i in layers.values()]
        device, queries = mask_logits[0].device, mask_logits[0].shape[1]
        counts = [min(len(t.labels), queries) for t in targets]
        generators: Sequence[Generator] = (
            [None] * len(targets) if seeds is None else generators_from(seeds, device)
        )
        points = [self.sampler.draw(counts, generators, device) for _ in layers]
        masks = [t.masks.float() for t in targets]
        matches = self._match(class_logits, mask_logits, targets, masks, points)
        masks_norm, class_norm = self._normalizers(sum(counts), len(targets) * queries)
        losses = {}
        for i, suffix in enumerate(layers):
            losses["loss_ce" + suffix] = self.weights.classes * (
                self._class_loss(class_logits[i], targets, matches[i]) / class_norm
            )
            bce, dice = self._mask_losses(mask_logits[i], masks, matches[i], points[i])
            losses["loss_mask" + suffix] = self.weights.mask * bce / masks_norm
            losses["loss_dice" + suffix] = self.weights.dice * dice / masks_norm
        return losses

    def _supervised_layers(self, count: int) -> dict[str, int]:
        """Loss suffix -> prediction, the last first: the order in which points are drawn."""
        layers = {"": count - 1}
        if self.deep_supervision:
            layers |= {f"_{i}": i for i in range(count - 1)}
        return layers

    @torch.no_grad()
    def _match(
        self,
        class_logits: list[Tensor],
        mask_logits: list[Tensor],
        targets: Sequence[Targets],
        masks: list[Tensor],
        points: list[LayerPoints],
    ) -> list[list[Match]]:
        places = torch.stack([p.matching for p in points], dim=1)  # (N, L, P, 2)
        n, layers, count, _ = places.shape
        at_points = [
            sample_at(m[:, None], p.reshape(1, -1, 2).expand(len(m), -1, -1))[:, 0]
            for m, p in zip(masks, places, strict=True)
        ]
        target_masks = pad_sequence(at_points, batch_first=True)  # (N, K, L * P)
        target_masks = target_masks.view(n, -1, layers, count)
        labels = pad_sequence([t.labels for t in targets], batch_first=True)
        costs = [
            matching_costs(
                class_logits[i],
                sample_at(mask_logits[i], places[:, i]),
                labels,
                target_masks[:, :, i],
                self.weights,
            )
            for i in range(layers)
        ]
        return match(torch.stack(costs), [len(t.labels) for t in targets])

    def _normalizers(self, matched: int, queries: int) -> tuple[Tensor, Tensor]:
        """Number of matched masks and total weight in the class loss, averaged over ranks.

        DistributedDataParallel averages gradients over ranks, so these averages make the sum over
        all ranks a mean over the whole batch.
        """
        device = self.empty_weight.device
        void = float(queries - matched) * self.empty_weight[-1]
        totals = torch.stack([torch.tensor(float(matched), device=device), matched + void])
        over_ranks = mean_over_ranks(totals)
        class_norm = (over_ranks if self.normalize_class_loss_over == "batch" else totals)[1]
        return over_ranks[0].clamp(min=1), class_norm

    def _class_loss(
        self, logits: Tensor, targets: Sequence[Targets], matches: list[Match]
    ) -> Tensor:
        """Weighted sum of the cross-entropies of all queries; unmatched ones should say void."""
        wanted = torch.full(logits.shape[:2], self.classes, device=logits.device)
        for row, target, (query, index) in zip(wanted, targets, matches, strict=True):
            row[query.to(row.device)] = target.labels[index.to(row.device)]
        return F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), self.empty_weight, reduction="sum"
        )

    def _mask_losses(
        self, logits: Tensor, masks: list[Tensor], matches: list[Match], points: LayerPoints
    ) -> tuple[Tensor, Tensor]:
        """Sums over the matched masks of mean binary cross-entropy and of dice loss."""
        if not len(points.candidates):  # nothing but void: zero, with a gradient of zero
            return logits.sum() * 0, logits.sum() * 0
        predicted = torch.cat(
            [
                image[query.to(image.device)]
                for image, (query, _) in zip(logits, matches, strict=True)
            ]
        )[:, None]
        chosen = self.sampler.choose(predicted, points)
        wanted = torch.cat(
            [
                image[index.to(image.device)]
                for image, (_, index) in zip(masks, matches, strict=True)
            ]
        )[:, None]
        wanted = sample_at(wanted, chosen)[:, 0]
        at_points = sample_at(predicted, chosen)[:, 0]
        bce = F.binary_cross_entropy_with_logits(at_points, wanted, reduction="none")
        inside = at_points.sigmoid()
        overlap = (inside * wanted).sum(1)
        dice = 1 - (2 * overlap + 1) / (inside.sum(1) + wanted.sum(1) + 1)
        return bce.mean(1).sum(), dice.sum()
