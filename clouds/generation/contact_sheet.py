"""The overview of a folder of generated images: some of them, with prompts and labels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.datasets.builtin import CLASSES_NAME, generated_description, with_own_classes
from clouds.data.datasets.description import DatasetDescription
from clouds.data.datasets.manifest import read_manifest
from clouds.data.labels import read_label
from clouds.data.reading import read_image
from clouds.generation.job import SHEET, GenerationJob, explain_write_errors, image_name, write_png
from clouds.visualizer import Tile, legend_of, side_by_side

UInt8Array = npt.NDArray[np.uint8]


def write_contact_sheet(
    job: GenerationJob, columns: int = 6, rows: int = 4, tile_width: int = 256
) -> Path:
    """Write an overview of evenly spaced images, their prompts and labels; returns its file."""
    shown = min(job.count, columns * rows)
    numbers = np.linspace(0, job.count - 1, shown).round().astype(int).tolist()
    columns = min(columns, shown)
    title = f"{job.output.name}: {job.count} images, {job.generator.name} {job.generator.model}"
    description = with_own_classes(
        generated_description(job.output.name), job.output / CLASSES_NAME
    )
    label_space, entries = description.label_space, read_manifest(job.manifest)
    panels: list[UInt8Array] = []
    for start in range(0, shown, columns):
        tiles = [
            _tile(job, number, entries[image_name(number)].prompt, description, tile_width)
            for number in numbers[start : start + columns]
        ]
        tiles += [Tile("", np.full((1, 1, 3), 255, np.uint8))] * (columns - len(tiles))
        last = start + columns >= shown and job.has_labels
        panels.append(
            side_by_side(
                tiles,
                title="" if panels else title.strip(),
                legend=legend_of(label_space, range(label_space.num_classes)) if last else (),
                tile_width=tile_width,
            )
        )
    path = job.output / SHEET
    sheet = cv2.cvtColor(np.vstack(panels), cv2.COLOR_RGB2BGR)
    with explain_write_errors(path):
        write_png(path, sheet)
    return path


def _tile(
    job: GenerationJob, number: int, prompt: str, description: DatasetDescription, width: int
) -> Tile:
    image = read_image(job.image_path(number))
    size = (width, max(1, round(width * image.shape[0] / image.shape[1])))
    tile = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if job.has_labels:
        label = read_label(job.label_path(number), description.label_formats[-1])
        small = cv2.resize(label.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        tile = np.vstack([tile, description.label_space.colorize(np.asarray(small, np.uint8))])
    max_length = width // 7  # 7 pixels per character
    caption = prompt if len(prompt) <= max_length else prompt[: max_length - 1].rstrip() + "…"
    return Tile(caption, np.asarray(tile, np.uint8))
