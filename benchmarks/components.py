"""Connected components of a label map: ours against scipy, class by class, in one run.

    python benchmarks/components.py [--size 768] [--repeats 20]

Both give the same components (checked): ids, areas and boxes of those above the threshold. The
processor's time is taken.
"""

from __future__ import annotations

import argparse
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from in_turns import timed
from scipy import ndimage

from clouds.self_training.refiners.sam.prompts import find_components

LARGER_THAN = 5000
CLASSES = 19


def label_map(size: int, smoothness: float, seed: int = 0) -> npt.NDArray[np.uint8]:
    """(size, size) uint8: which of 19 smooth random fields is largest."""
    generator = np.random.default_rng(seed)
    fields = [
        ndimage.gaussian_filter(generator.normal(size=(size, size)), smoothness)
        for _ in range(CLASSES)
    ]
    return np.argmax(fields, axis=0).astype(np.uint8)


def by_scipy(classes: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Component ids, -1 elsewhere, and areas: scipy labels each class's mask."""
    ids = np.full(classes.shape, -1, np.int32)
    areas: list[int] = []
    for kind in np.unique(classes):
        regions, _ = ndimage.label(classes == kind)
        sizes = np.bincount(regions.ravel())
        for region in np.flatnonzero(sizes > LARGER_THAN):
            if region:
                ids[regions == region] = len(areas)
                areas.append(int(sizes[region]))
    return ids, areas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(f"{args.size}x{args.size}, {CLASSES} classes, larger than {LARGER_THAN} pixels, ms")
    print(f"{'map':>8} {'regions':>8} {'kept':>5} {'ours':>7} {'scipy':>8} {'ratio':>6}")
    for name, smoothness in (("ragged", 3.0), ("medium", 12.0), ("smooth", 40.0)):
        classes = label_map(args.size, smoothness)
        ours = find_components(classes, LARGER_THAN)
        ids, areas = by_scipy(classes)
        assert (ours.ids == ids).all(), "components differ"
        assert ours.areas.tolist() == areas, "areas differ"
        ways = {
            "ours": lambda c=classes: find_components(c, LARGER_THAN),
            "scipy": lambda c=classes: by_scipy(c),
        }
        times = timed(ways, args.repeats, torch.device("cpu"), untimed=1)
        fast, slow = (1000 * median(taken) for taken in times.values())
        regions = len(find_components(classes))
        print(
            f"{name:>8} {regions:>8} {len(ours):>5} {fast:>7.2f} {slow:>8.2f} {slow / fast:>5.1f}x"
        )


if __name__ == "__main__":
    main()
