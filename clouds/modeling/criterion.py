"""The losses of a set of class and mask predictions (Mask2Former, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from clouds.comm import mean_over_ranks
from clouds.data.structures import Targets
from clouds.modeling.matcher import CostWeights, Match, match, matching_costs
from clouds.modeling.points import (
    Generator,
    Points,
    PointSampler,
    generators_from,
    pair_losses,
    sample_at,
    weights_at,
)
from clouds.modeling.transformer_decoder.decoder import Predictions


@dataclass(frozen=True)
class Pairs:
    """M pairs in each of L predictions of N images with Q queries, image after image.

    Attributes:
        queries: (L, M), among the N * Q of a prediction.
        targets: per image (L, m), among its own targets.
        by_target: per image, the order (L * m,) that sorts its pairs of all predictions by target.
        counts: m, per image.
    """

    queries: Tensor
    targets: Sequence[Tensor]
    by_target: Sequence[Tensor]
    counts: list[int]

    @classmethod
    def of(cls, matches: Sequence[Sequence[Match]], queries: int, device: torch.device) -> Pairs:
        """
        Args:
            matches: per prediction, per image.
            queries: Q.
            device: all indices travel there together.
        """
        images = [
            (torch.stack([q for q, _ in image]), torch.stack([t for _, t in image]))
            for image in zip(*matches, strict=True)
        ]
        sizes = [t.numel() for _, t in images]
        orders = torch.cat([t.flatten().argsort(stable=True) for _, t in images])
        on_host = torch.stack(
            [
                torch.cat([q + i * queries for i, (q, _) in enumerate(images)], dim=1),
                torch.cat([t for _, t in images], dim=1),
                orders.view(len(matches), sum(sizes) // len(matches)),
            ]
        )
        every_query, targets, orders = on_host.to(device, non_blocking=True)
        counts = [t.shape[1] for _, t in images]
        by_target = orders.flatten().split(sizes)
        return cls(every_query, targets.split(counts, dim=1), by_target, counts)

    def queries_of_images(self, queries: int) -> list[Tensor]:
        """Per image (L, m), among its own Q queries."""
        images = torch.split(self.queries, self.counts, dim=1)
        return [image - i * queries for i, image in enumerate(images)]


class SetCriterion(nn.Module):
    """Matches predictions with targets and takes class, mask and dice losses of the pairs.

    Weights of pixels (`Targets.weights`) reach the mask and the dice loss, and the same terms of
    matching, as `mask_losses` says. The class loss does not know them: a query that is matched with
    no target should say void, even if it covers only pixels that do not count, and a target should
    be found, even if none of its pixels counts.

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
        class_logits = torch.stack([predictions.class_logits[i].float() for i in layers.values()])
        mask_logits = [predictions.mask_logits[i].float() for i in layers.values()]
        device, queries = class_logits.device, class_logits.shape[2]
        counts = [min(len(t.labels), queries) for t in targets]
        generators: Sequence[Generator] = (
            [None] * len(targets) if seeds is None else generators_from(seeds, device)
        )
        points = self.sampler.draw(len(layers), counts, generators, device)
        masks = [_weighed_masks(t) for t in targets]
        matches = self._match(class_logits, mask_logits, targets, masks, points)
        pairs = Pairs.of(matches, queries, device)
        void = math.fsum((queries - c) * t.void for c, t in zip(counts, targets, strict=True))
        masks_norm, class_norm = self._normalizers(sum(counts), void)
        classes = self._class_losses(class_logits, targets, pairs) / class_norm
        chosen = predictions.chosen_masks(list(layers.values()), pairs.queries_of_images(queries))
        bce, dice = self._mask_losses(chosen, targets, masks, pairs, points) / masks_norm
        losses = {}
        for i, suffix in enumerate(layers):
            losses["loss_ce" + suffix] = self.weights.classes * classes[i]
            losses["loss_mask" + suffix] = self.weights.mask * bce[i]
            losses["loss_dice" + suffix] = self.weights.dice * dice[i]
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
        class_logits: Tensor,
        mask_logits: list[Tensor],
        targets: Sequence[Targets],
        masks: list[Tensor],
        points: list[Points],
    ) -> list[list[Match]]:
        places = torch.stack([p.matching for p in points])  # (N, L, P, 2)
        n, layers, count, _ = places.shape
        at_points = [
            sample_at(m[None], p.reshape(1, -1, 2))[0] for m, p in zip(masks, places, strict=True)
        ]
        target_masks = pad_sequence(at_points, batch_first=True)  # (N, K, L * P)
        target_masks = target_masks.view(n, -1, layers, count)
        labels = pad_sequence([t.labels for t in targets], batch_first=True)
        weights = _matching_weights(targets, places)
        # What a CPU works on stays in its cache.
        images = [slice(i, i + 1) for i in range(n)] if places.is_cpu else [slice(n)]
        costs = [
            torch.cat(
                [
                    matching_costs(
                        class_logits[i, some],
                        sample_at(mask_logits[i][some], places[some, i]),
                        labels[some],
                        target_masks[some, :, i],
                        self.weights,
                        weights[some, i],
                    )
                    for some in images
                ]
            )
            for i in range(layers)
        ]
        return match(torch.stack(costs), [len(t.labels) for t in targets])

    def _normalizers(self, matched: int, void: float) -> tuple[Tensor, Tensor]:
        """Number of matched masks and total weight in the class loss, averaged over ranks.

        `void` is the number of unmatched queries, each as `Targets.void` counts it.

        DistributedDataParallel averages gradients over ranks, so these averages make the sum over
        all ranks a mean over the whole batch.
        """
        device = self.empty_weight.device
        total = matched + void * self.empty_weight[-1]
        totals = torch.stack([torch.full((), float(matched), device=device), total])
        over_ranks = mean_over_ranks(totals)
        class_norm = (over_ranks if self.normalize_class_loss_over == "batch" else totals)[1]
        return over_ranks[0].clamp(min=1), class_norm

    def _class_losses(self, logits: Tensor, targets: Sequence[Targets], pairs: Pairs) -> Tensor:
        """Weighted sums of the cross-entropies of all queries; unmatched ones should say void.

        Args:
            logits: (L, N, Q, C + 1)

        Returns:
            (L,)
        """
        layers, n, queries, _ = logits.shape
        labels = [t.labels[index] for t, index in zip(targets, pairs.targets, strict=True)]
        wanted = torch.full((layers, n * queries), self.classes, device=logits.device)
        wanted.scatter_(1, pairs.queries, torch.cat(labels, dim=1))
        entropy = F.cross_entropy(
            logits.flatten(0, 2), wanted.flatten(), self.empty_weight, reduction="none"
        )
        entropy = entropy.view(layers, -1)
        if any(t.void != 1 for t in targets):
            factor = torch.cat([entropy.new_full((queries,), t.void) for t in targets])
            entropy = torch.where(wanted == self.classes, entropy * factor, entropy)
        return entropy.sum(1)

    def _mask_losses(
        self,
        matched: Sequence[Tensor],
        targets: Sequence[Targets],
        masks: list[Tensor],
        pairs: Pairs,
        points: list[Points],
    ) -> Tensor:
        """Sums over the matched masks of binary cross-entropy and of dice loss: (2, L).

        Args:
            matched: per image the logits of matched queries (L, m, h, w).
        """
        if not sum(pairs.counts):  # nothing but void: zero, with a gradient of zero
            return torch.stack([m.flatten(1).sum(1) for m in matched]).sum(0).expand(2, -1)
        images = enumerate(zip([m.float() for m in matched], targets, masks, points, strict=True))
        losses = []
        for i, (predicted, target, whole, drawn) in images:
            chosen = self.sampler.choose(predicted, drawn, target.weights)
            of_image = pair_losses(
                sample_at(predicted.flatten(0, 1)[:, None], chosen)[:, 0],
                _read_matched(whole, chosen, pairs.targets[i], pairs.by_target[i]),
                None if target.weights is None else weights_at(target.weights, chosen),
            )
            losses.append(of_image.view(2, *pairs.targets[i].shape).sum(2))
        return torch.stack(losses).sum(0)


@torch.no_grad()
def _read_matched(masks: Tensor, points: Tensor, targets: Tensor, by_target: Tensor) -> Tensor:
    """Masks of targets (L, m) among (K, H, W) at points (L * m, P, 2) of each: (L * m, P)."""
    layers, matched = targets.shape
    if matched < len(masks):  # more targets than queries: other ones in each prediction
        return sample_at(masks.index_select(0, targets.flatten())[:, None], points)[:, 0]
    # All places at which a mask is needed are read at once, and it is never copied.
    sorted_points = points.index_select(0, by_target).view(matched, layers * points.shape[1], 2)
    read = sample_at(masks[:, None], sorted_points).view(points.shape[:2])
    return torch.empty_like(read).index_copy_(0, by_target, read)


def _weighed_masks(target: Targets) -> Tensor:
    masks = target.masks.float()
    return masks if target.weights is None else masks * target.weights


def _matching_weights(targets: Sequence[Targets], places: Tensor) -> Tensor:
    """Weights of pixels at points (N, L, P, 2) of all images."""
    return torch.stack(
        [
            torch.ones_like(p[..., 0]) if t.weights is None else weights_at(t.weights, p)
            for t, p in zip(targets, places, strict=True)
        ]
    )
