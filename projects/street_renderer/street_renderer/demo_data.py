"""Folders of rendered datasets, with a record of how each dataset was rendered.

The record holds seed, size and number of images of each dataset. A run with the same values adds
the missing images; other values raise an error unless overwriting was requested. Files of datasets
that are not in the record are never changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clouds.files import atomic_write
from street_renderer.dataset_writer import (
    FAMILIES,
    Recipe,
    RenderJob,
    dataset_names,
    folders,
    sample_paths,
    unlabelled_classes,
)
from street_renderer.renderer import RENDERER_VERSION, check_size

RECORD = "demo_data.json"


@dataclass(frozen=True)
class RenderedDataset:
    """Record of a rendered dataset.

    Attributes:
        seed: of the dataset.
        size: (height, width) of an image, pixels.
        count: number of images.
        renderer: `RENDERER_VERSION`, stored under the key "painter".
        show_unlabelled: see `Recipe`; only for a dataset that does not label all classes.
    """

    seed: int
    size: tuple[int, int]
    count: int
    renderer: int = RENDERER_VERSION
    show_unlabelled: bool = False

    def __str__(self) -> str:
        rows, columns = self.size
        version = "" if self.renderer == RENDERER_VERSION else f", renderer version {self.renderer}"
        shown = ", with unlabelled classes" if self.show_unlabelled else ""
        return f"{self.count} images of {rows}x{columns}, seed {self.seed}{version}{shown}"


def image_counts(datasets: Sequence[str], train: int, val: int) -> dict[str, int]:
    """Number of images of each requested dataset.

    Args:
        datasets: names of `FAMILIES` or of single splits; empty for all families.
        train, val: images of each training and of each validation split.

    Raises:
        ValueError: an unknown name, or a number of images below 1.
    """
    chosen: dict[str, int] = {}
    for name in datasets or tuple(FAMILIES):
        if name not in FAMILIES and name not in dataset_names():
            raise ValueError(
                f"unknown dataset {name!r}. Known: {', '.join(FAMILIES)}; or single splits: "
                f"{', '.join(dataset_names())}"
            )
        for row in FAMILIES.get(name, (name,)):
            chosen[row] = val if row.endswith("_val") else train
    for row, count in chosen.items():
        if count < 1:
            option = "--val" if row.endswith("_val") else "--train"
            raise ValueError(f"{row}: {count} images requested; {option} must be at least 1")
    return chosen


def prepare(
    root: Path,
    counts: Mapping[str, int],
    seed: int,
    size: tuple[int, int],
    overwrite: bool = False,
    show_unlabelled: bool = False,
) -> list[RenderJob]:
    """Prepare a folder and list the images that are missing in it.

    Args:
        root: the dataset root.
        counts: number of images by dataset name.
        size: (height, width), pixels.
        overwrite: delete datasets that were rendered with other values.
        show_unlabelled: see `Recipe`.

    Raises:
        ValueError: the size is too small, the seed is negative, or the record is invalid.
        FileExistsError: the folder contains other images; nothing is changed then.
        OSError: the folder cannot be written.
    """
    check_size(size)
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if root.is_file():
        raise FileExistsError(f"{root} is a file; --output must name a folder")
    root.mkdir(parents=True, exist_ok=True)
    recorded = read_record(root)
    shown = {name: show_unlabelled and bool(unlabelled_classes(name)) for name in counts}
    requested = {
        name: RenderedDataset(seed, size, count, show_unlabelled=shown[name])
        for name, count in counts.items()
    }
    outdated = [
        name
        for name in requested
        if _is_outdated(root, name, recorded.get(name), requested[name], overwrite)
    ]
    for name in outdated:
        del recorded[name]
        _write_record(root, recorded)
        for folder in _existing_folders(root, name):
            shutil.rmtree(folder)
    # Written before the images: an interrupted run must be recognized and resumed.
    _write_record(root, recorded | requested)
    jobs = []
    for name, count in counts.items():
        recipe = Recipe.of(name, seed, size, shown[name])
        for index in range(count):
            image, label = sample_paths(root, name, index)
            if not (image.is_file() and label.is_file()):
                jobs.append(RenderJob(recipe, index, image, label))
    return jobs


def _is_outdated(
    root: Path,
    name: str,
    recorded: RenderedDataset | None,
    requested: RenderedDataset,
    overwrite: bool,
) -> bool:
    """Whether existing images must be deleted; FileExistsError if that is not allowed."""
    if recorded is None:
        filled = [folder for folder in _existing_folders(root, name) if any(folder.rglob("*.*"))]
        if filled:
            raise FileExistsError(
                f"{filled[0]} contains files that are not in {root / RECORD}: they may be a real "
                "dataset. Nothing was changed; choose another --output."
            )
        return False
    if replace(recorded, count=requested.count) == requested and recorded.count <= requested.count:
        return False
    if overwrite:
        return True
    raise FileExistsError(
        f"{name} in {root} has {recorded}; requested are {requested}. Add --overwrite to replace "
        "it, or choose another --output."
    )


def _existing_folders(root: Path, name: str) -> list[Path]:
    """The folders of a dataset's images and labels that exist."""
    return [root / folder for folder in folders(name) if (root / folder).is_dir()]


# ---------------------------------------------------------------------- the record
def read_record(root: Path) -> dict[str, RenderedDataset]:
    """The rendered datasets under a dataset root, by name; empty without a record.

    Raises:
        ValueError: the record is invalid.
    """
    path = root / RECORD
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {
            str(name): RenderedDataset(
                int(entry["seed"]),
                (int(entry["size"][0]), int(entry["size"][1])),
                int(entry["count"]),
                int(entry["painter"]),
                bool(entry.get("show_unlabelled", False)),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} is broken ({error!r}). It records the datasets rendered here; delete the "
            f"folder {root} if it contains nothing else, or choose another --output."
        ) from error


def _write_record(root: Path, datasets: Mapping[str, RenderedDataset]) -> None:
    # The key "painter" is kept: older folders have it.
    entries = {
        name: {"seed": d.seed, "size": d.size, "count": d.count, "painter": d.renderer}
        | ({"show_unlabelled": True} if d.show_unlabelled else {})
        for name, d in sorted(datasets.items())
    }
    with atomic_write(root / RECORD, "w") as file:
        file.write(json.dumps(entries, indent=2) + "\n")
