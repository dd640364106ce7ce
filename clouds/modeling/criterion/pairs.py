"""Matched pairs of all predictions and images, in the form in which losses need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clouds.modeling.criterion.matcher import Match


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
