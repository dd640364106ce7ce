"""Connected components of a label map: ours against scipy class by class, in one run.

    python benchmarks/components.py [--size 768] [--repeats 20]

Ids and areas of the components above the threshold are compared first. The time is CPU time.
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
NUM_CLASSES = 19


def label_map(size: int, smoothness: float, seed: int = 0) -> npt.NDArray[np.uint8]:
    """(size, size) uint8: the argmax of 19 smooth random fields."""
    generator = np.random.default_rng(seed)
    fields = [
        ndimage.gaussian_filter(generator.normal(size=(size, size)), smoothness)
        for _ in range(NUM_CLASSES)
    ]
    return np.argmax(fields, axis=0).astype(np.uint8)


def by_scipy(classes: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Component ids (-1 where there is none) and areas; scipy labels the mask of each class."""
    ids = np.full(classes.shape, -1, np.int32)
    areas: list[int] = []
    for number in np.unique(classes):
        regions, _ = ndimage.label(classes == number)
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
    print(f"{args.size}x{args.size}, {NUM_CLASSES} classes, larger than {LARGER_THAN} pixels, ms")
    print(f"{'map':>8} {'regions':>8} {'kept':>5} {'ours':>7} {'scipy':>8} {'ratio':>6}")
    for name, smoothness in (("ragged", 3.0), ("medium", 12.0), ("smooth", 40.0)):
        classes = label_map(args.size, smoothness)
        ours = find_components(classes, LARGER_THAN)
        ids, areas = by_scipy(classes)
        assert (ours.ids == ids).all(), "components differ"
        assert ours.areas.tolist() == areas, "areas differ"
        variants = {
            "ours": lambda c=classes: find_components(c, LARGER_THAN),
            "scipy": lambda c=classes: by_scipy(c),
        }
        times = timed(variants, args.repeats, torch.device("cpu"), untimed=1)
        our_ms, scipy_ms = (1000 * median(taken) for taken in times.values())
        regions = len(find_components(classes))
        print(
            f"{name:>8} {regions:>8} {len(ours):>5} {our_ms:>7.2f} "
            f"{scipy_ms:>8.2f} {scipy_ms / our_ms:>5.1f}x"
        )


if __name__ == "__main__":
    main()
