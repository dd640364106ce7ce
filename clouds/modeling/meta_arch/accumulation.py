"""Gradient accumulation: what the losses of a part of a batch need of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch

from clouds.data.structures import Sample, Targets, seeds_of
from clouds.modeling.backbone.adapters import adapter_of
from clouds.modeling.criterion import BatchPart, BatchTotals

if TYPE_CHECKING:
    from clouds.modeling.meta_arch.clouds import CLOUDS


@torch.no_grad()
def prepare_parts(model: CLOUDS, parts: Sequence[Sequence[Sample]]) -> list[BatchPart]:
    """Targets of all parts, and the normalizers of the batch; a collective operation.

    Parts with images of partly labelled datasets are predicted here, too: the normalizer of their
    class loss depends on the predictions.
    """
    targets = [model.targets(part) for part in parts]
    decoder = model.sem_seg_head.predictor
    queries = adapter_of(model.backbone).object_queries()
    num_queries = decoder.num_queries if queries is None else len(queries)
    totals = model.criterion.totals_of_targets(
        list(chain(*targets)), decoder.num_predictions, num_queries
    )
    if totals is None:
        totals = _predicted_totals(model, parts, targets)
    normalizers = model.criterion.normalizers(totals)
    return [BatchPart(part_targets, normalizers) for part_targets in targets]


def _predicted_totals(
    model: CLOUDS, parts: Sequence[Sequence[Sample]], targets: Sequence[Sequence[Targets]]
) -> BatchTotals:
    """Totals of all parts, from predictions with the random numbers that training will have."""
    totals = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        for part, part_targets in zip(parts, targets, strict=True):
            predictions, padded = model.predict_targets(part, part_targets)
            totals.append(model.criterion.totals(predictions, padded, seeds_of(part)))
    return sum(totals[1:], totals[0])
