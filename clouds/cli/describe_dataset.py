"""Write a first description of a dataset of one's own: a YAML file for DATASETS.DESCRIPTIONS.

It looks at the names of the files, and at the pixels of some labels: which ids or colors they
have, how many pixels of each, and how they are stored. It writes the file, with empty names of
classes, and an image that shows each id. Write the names, and the file is complete.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clouds.cli.command_line import new_parser, path, user_errors_in_one_line

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from clouds.data.draft import Draft

    UInt8Array = npt.NDArray[np.uint8]

_COLUMNS = 4
_TILE_WIDTH = 320
_YELLOW = (255, 214, 0)  # outline of the pixels that have the id
_DARK = 0.25  # brightness of the pixels that do not have the id


def main(argv: Sequence[str] | None = None) -> None:
    """Write the two files, and print what they say."""
    args = parse(argv)
    with user_errors_in_one_line():
        print(describe(args))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("describe-dataset", __doc__)
    parser.add_argument("images", type=path, metavar="IMAGES", help="folder of the images")
    parser.add_argument("labels", type=path, metavar="LABELS", help="folder of the labels")
    for split in ("val", "test"):
        parser.add_argument(
            f"--{split}",
            nargs=2,
            type=path,
            metavar=("IMAGES", "LABELS"),
            help=f"folders of the split '{split}', if it has folders of its own; ids are not read",
        )
    parser.add_argument(
        "--name", metavar="NAME", help="of the dataset (default: that of the folder of both)"
    )
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="the YAML file (default: NAME.yaml)"
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=200,
        metavar="N",
        help="number of label files that are read; 0: all (default: 200)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args(argv)
    if args.sample < 0:
        parser.error(f"--sample is {args.sample}; it must be at least 0")
    return args


def describe(args: argparse.Namespace) -> str:
    """Write the files; returns the text to print."""
    from PIL import Image
    from tqdm import tqdm

    from clouds.data.draft import description_text, draft_of, shares, value_name
    from clouds.files import atomic_write

    name = args.name or default_name(args.images, args.labels)
    output = args.output or Path(f"{name}.yaml")
    sheet = output.with_name(f"{output.stem}_ids.png")
    existing = [str(file) for file in (output, sheet) if file.exists()]
    if existing and not args.overwrite:
        raise ValueError(
            f"{' and '.join(existing)} exist already; choose another --output, or --overwrite"
        )

    def progress(numbers: Sequence[int]) -> Iterable[int]:
        return tqdm(numbers, desc="labels", unit="file")

    further = {name: tuple(f) for name in ("val", "test") if (f := getattr(args, name))}
    draft = draft_of(args.images, args.labels, args.sample, progress)
    with atomic_write(output, "w") as file:
        file.write(description_text(draft, name, output.absolute().parent, sheet.name, further))
    with atomic_write(sheet, "wb") as file:
        Image.fromarray(value_sheet(draft)).save(file, "PNG")
    lines = [f"{value_name(draft, value):>16}  {shares(draft, value)}" for value in draft.counts]
    images, labels = draft.unpaired
    return "\n".join(
        [
            f"{len(draft.pairs)} pairs; without partner: {images} images, {labels} labels",
            f"stored as: {draft.channel}",
            *lines,
            f"{output}: write the names of the classes, which {sheet} shows. Then:",
            f"  clouds check-data --descriptions {output} --full",
        ]
    )


def default_name(images: Path, labels: Path) -> str:
    """The name of the folder that both folders are in, without characters that are not allowed."""
    both = {folder.absolute().parent for folder in (images, labels)}
    name = both.pop().name if len(both) == 1 else images.absolute().name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-") or "dataset"


def value_sheet(draft: Draft) -> UInt8Array:
    """For each value the image with most of it, its pixels outlined; (H, W, 3) RGB."""
    import cv2
    import numpy as np

    from clouds.data.draft import read_values, shares, value_name
    from clouds.data.reading import read_image
    from clouds.visualizer import Tile, side_by_side

    tiles = []
    for value, count in draft.counts.items():
        image, label = (draft.read[count.best][0], draft.read[count.best][1])
        pixels = read_image(image)
        has_value = read_values(label, draft.channel) == value
        if has_value.shape != pixels.shape[:2]:
            raise ValueError(
                f"{label}: the label is {has_value.shape[1]}x{has_value.shape[0]} pixels, but its "
                f"image {image} is {pixels.shape[1]}x{pixels.shape[0]}"
            )
        shown = np.where(has_value[..., None], pixels, pixels * _DARK).astype(np.uint8)
        border = np.ones((round(shown.shape[1] / _TILE_WIDTH) + 2,) * 2, np.uint8)
        outline = cv2.morphologyEx(has_value.astype(np.uint8), cv2.MORPH_GRADIENT, border)
        shown[outline > 0] = _YELLOW
        tiles.append(Tile(f"{value_name(draft, value)}: {shares(draft, value)}", shown))
    rows = [
        side_by_side(tiles[i : i + _COLUMNS], tile_width=_TILE_WIDTH)
        for i in range(0, len(tiles), _COLUMNS)
    ]
    width = max(row.shape[1] for row in rows)
    padded = [
        np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255)
        for row in rows
    ]
    return np.concatenate(padded)
