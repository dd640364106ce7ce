"""A contact sheet of datasets on disk: images above their labels in class colors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from clouds.data.datasets import get_dataset
from clouds.data.reading import read_image
from clouds.visualizer import Tile, legend_of, side_by_side
from street_renderer.canvas import Bytes


def dataset_sheet(
    root: Path, names: Sequence[str], columns: int = 6, tile_width: int = 320
) -> Bytes:
    """Draw the first images of some datasets with their labels.

    Args:
        root: dataset root.
        names: dataset names.
        columns: images per dataset.
        tile_width: width of an image, pixels; its height is at most two thirds of it.

    Returns:
        (height, width, 3) uint8 RGB: per dataset a row of images above a row of labels; a legend
        of all classes at the end.

    Raises:
        FileNotFoundError, ValueError: a dataset is missing or broken.
    """
    panels = []
    for name in names:
        dataset = get_dataset(name, root)
        records, label_space = dataset.records(), dataset.label_space
        tiles = []
        for record in records[:columns]:
            label = label_space.colorize(dataset.read_label(record))
            image = _letterbox(read_image(record.image), tile_width, cv2.INTER_AREA)
            label = _letterbox(label, tile_width, cv2.INTER_NEAREST)
            tiles.append(Tile(record.image.name, np.vstack([image, label])))
        tiles += [Tile("", np.full((1, tile_width, 3), 255, np.uint8))] * (columns - len(tiles))
        all_classes = range(label_space.num_classes)
        legend = legend_of(label_space, all_classes) if name == names[-1] else ()
        title = f"{name}: {len(records)} images"
        panels.append(side_by_side(tiles, title=title, legend=legend, tile_width=tile_width))
    return np.vstack(panels)


def _letterbox(image: Bytes, width: int, interpolation: int) -> Bytes:
    """Resize to a width; an image with more than two thirds of it as height is fit and centered."""
    rows, columns = image.shape[:2]
    scale = min(width / columns, width / 1.5 / rows)
    size = (round(columns * scale), round(rows * scale))
    small = cv2.resize(image, size, interpolation=interpolation)
    left = (width - size[0]) // 2
    boxed = np.full((size[1], width, 3), 255, np.uint8)
    boxed[:, left : left + size[0]] = small
    return boxed
