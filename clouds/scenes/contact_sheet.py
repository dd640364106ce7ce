"""A contact sheet of datasets on disk: pictures over their labels in class colors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from clouds.data.datasets import get_dataset
from clouds.data.label_space import CITYSCAPES_19
from clouds.data.reading import read_image
from clouds.scenes.canvas import Bytes
from clouds.visualize import Tile, side_by_side


def contact_sheet(
    root: Path, names: Sequence[str], columns: int = 6, tile_width: int = 320
) -> Bytes:
    """Show the first pictures of some datasets, read through the table of datasets.

    Args:
        root: dataset root.
        names: rows of the table.
        columns: pictures of each.
        tile_width: of a picture, pixels; all are shown with two rows to three columns at most.

    Returns:
        (height, width, 3) uint8 RGB: for each dataset a line of pictures and one of labels, and
        a legend of all classes at the end.

    Raises:
        FileNotFoundError, ValueError: a dataset is missing or broken.
    """
    panels = []
    for name in names:
        dataset = get_dataset(name, root)
        records = dataset.records()
        tiles = []
        for record in records[:columns]:
            label = CITYSCAPES_19.colorize(dataset.read_label(record))
            both = np.vstack([_boxed(p, tile_width) for p in (read_image(record.image), label)])
            tiles.append(Tile(record.image.name, both))
        tiles += [Tile("", np.full((1, tile_width, 3), 255, np.uint8))] * (columns - len(tiles))
        legend = range(CITYSCAPES_19.num_classes) if name == names[-1] else ()
        title = f"{name}: {len(records)} pictures"
        panels.append(side_by_side(tiles, title=title, legend=tuple(legend), tile_width=tile_width))
    return np.vstack(panels)


def _boxed(picture: Bytes, width: int) -> Bytes:
    """Scale to a width; a picture that is higher than 2:3 is scaled to fit and centered."""
    rows, columns = picture.shape[:2]
    scale = min(width / columns, width / 1.5 / rows)
    size = (round(columns * scale), round(rows * scale))
    # Nearest keeps the colors of labels apart; pictures lose little by it.
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    few = len(np.unique(picture.reshape(-1, 3)[:: max(1, rows * columns // 2000)], axis=0)) < 21
    small = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST if few else smooth)
    margin = width - size[0]
    return np.asarray(
        cv2.copyMakeBorder(small, 0, 0, margin // 2, margin - margin // 2, cv2.BORDER_CONSTANT,
                           value=(255, 255, 255))
    )  # fmt: skip
