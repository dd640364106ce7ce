"""Write the images of the README and the documents from the results of `make demo`.

    python docs/make_images.py

All images are rendered by the demo; no image of a real dataset is among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import clouds
from clouds.data.datasets import get_dataset
from clouds.data.reading import read_image
from clouds.visualizer import Tile, UInt8Array, legend_of, present_ids, side_by_side

SOURCE = "gta5/images/00309.png"
GENERATED = "stable_diffusion/demo/images/000221.png"
UNSEEN = "bdd100k/images/10k/val/3f0e9858-9db58b08.jpg"
PANELS = ("1.png", "2.png")
QUALITY = 90  # of JPEG
TILE_WIDTH = 220  # pixels; captions stay legible at the width of a page


def strip(data: Path, weights: Path) -> UInt8Array:
    """Labelled source, generated image, image of an unseen domain, and its prediction.

    Args:
        data: the datasets of the demo.
        weights: its checkpoint of joint training.
    """
    source = get_dataset("gta5", root=data)
    record = next(r for r in source.records() if r.image == data / SOURCE)
    label = source.read_label(record)
    prediction = clouds.load(weights, device="cpu")(data / UNSEEN)
    colors = prediction.label_space.colorize(prediction.labels)
    source_image, unseen = read_image(data / SOURCE), read_image(data / UNSEEN)
    tiles = [
        Tile("labelled source", source_image),
        Tile("label", prediction.label_space.colorize(label)),
        Tile("generated, without label", read_image(data / GENERATED)),
        Tile("unseen domain", unseen),
        Tile("prediction", colors),
    ]
    ids = present_ids([label, np.asarray(prediction.labels)])
    return side_by_side(tiles, legend=legend_of(prediction.label_space, ids), tile_width=TILE_WIDTH)


def labels(demo: Path) -> UInt8Array:
    """Labels of two generated images by teacher, SAM and student, and the true ones."""
    panels = [read_image(demo / "joint/visualizations/sd_demo" / name) for name in PANELS]
    return np.concatenate(panels)


def main() -> None:
    """Write the images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("datasets/demo"), help="datasets of the demo")
    add("--demo", type=Path, default=Path("output/demo"), help="results of the demo")
    add("--output", type=Path, default=Path(__file__).parent / "images", help="folder to write to")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    panel = strip(args.data, args.demo / "joint" / "model_final.pth")
    Image.fromarray(panel).save(args.output / "strip.jpg", quality=QUALITY)
    Image.fromarray(labels(args.demo)).save(args.output / "labels.jpg", quality=QUALITY)


if __name__ == "__main__":
    main()
