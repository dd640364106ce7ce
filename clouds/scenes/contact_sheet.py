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
from clouds.visualizer import Tile, side_by_side


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
            image = _boxed(read_image(record.image), tile_width, cv2.INTER_AREA)
            # Colors of labels must not be averaged.
            label = _boxed(label, tile_width, cv2.INTER_NEAREST)
            tiles.append(Tile(record.image.name, np.vstack([image, label])))
        tiles += [Tile("", np.full((1, tile_width, 3), 255, np.uint8))] * (columns - len(tiles))
        legend = range(CITYSCAPES_19.num_classes) if name == names[-1] else ()
        title = f"{name}: {len(records)} pictures"
        panels.append(side_by_side(tiles, title=title, legend=tuple(legend), tile_width=tile_width))
    return np.vstack(panels)


def _boxed(picture: Bytes, width: int, interpolation: int) -> Bytes:
    """Scale to a width; a picture that is higher than 2:3 is scaled to fit and centered."""
    rows, columns = picture.shape[:2]
    scale = min(width / columns, width / 1.5 / rows)
    size = (round(columns * scale), round(rows * scale))
    small = cv2.resize(picture, size, interpolation=interpolation)
    left = (width - size[0]) // 2
    boxed = np.full((size[1], width, 3), 255, np.uint8)
    boxed[:, left : left + size[0]] = small
    return boxed
