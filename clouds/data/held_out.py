"""Images of the source that training leaves out, to choose weights by (SOURCE_VAL_FRACTION)."""

from __future__ import annotations

from collections.abc import Sequence

from clouds.data.structures import Record


def split(
    records: Sequence[Record], fraction: float, name: str
) -> tuple[list[Record], list[Record]]:
    """Images to train on, and held-out ones at equal distances in the list.

    The split depends on the list and the fraction alone, not on SEED.

    Args:
        records: of a dataset, sorted by path.
        fraction: share of the held-out images, of which there is at least one; 0: none.
        name: of the dataset, for messages.

    Raises:
        ValueError: no image would be left to train on.
    """
    if fraction == 0:
        return list(records), []
    total = len(records)
    count = max(1, round(fraction * total))
    if count >= total:
        raise ValueError(
            f"dataset {name}: {count} of its {total} images would be held out by "
            f"DATASETS.SOURCE_VAL_FRACTION {fraction}, and none is left to train on. Set it to 0."
        )
    chosen = {(2 * i + 1) * total // (2 * count) for i in range(count)}
    train = [record for i, record in enumerate(records) if i not in chosen]
    return train, [record for i, record in enumerate(records) if i in chosen]
