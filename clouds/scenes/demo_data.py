"""Fills a folder with painted datasets, and remembers what it has filled it with.

A record in the folder says with which seed and size each dataset was painted. Painting the same
again only adds what is missing; anything else stops, unless overwriting was asked for. Files that
the record does not know are never touched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2

from clouds.files import written_whole
from clouds.scenes.painter import check_size
from clouds.scenes.writers import FAMILIES, Recipe, folders, picture_paths, row_names, write_picture

RECORD = "demo_data.json"
PAINTER = 1
"""Grows whenever the painter changes its pictures, so that old ones are not mixed with new ones."""


@dataclass(frozen=True)
class Painted:
    """How a dataset was painted: the seed, (rows, columns) of a picture, how many, by what."""

    seed: int
    size: tuple[int, int]
    count: int
    painter: int = PAINTER

    def __str__(self) -> str:
        rows, columns = self.size
        version = "" if self.painter == PAINTER else f", by version {self.painter} of the painter"
        return f"{self.count} pictures of {rows}x{columns}, seed {self.seed}{version}"


@dataclass(frozen=True)
class Job:
    """One picture to paint and its files; see `write_picture`."""

    recipe: Recipe
    index: int
    image: Path
    label: Path


def counts(datasets: Sequence[str], train: int, val: int) -> dict[str, int]:
    """How many pictures of each row of the table of datasets are asked for.

    Args:
        datasets: names of `FAMILIES` or of rows; none stands for all families.
        train, val: pictures of each training and of each validation split.

    Raises:
        ValueError: an unknown name, or a number that is not positive where it is needed.
    """
    chosen: dict[str, int] = {}
    for name in datasets or tuple(FAMILIES):
        if name not in FAMILIES and name not in row_names():
            raise ValueError(
                f"unknown dataset {name!r}. Known: {', '.join(FAMILIES)}; or single splits: "
                f"{', '.join(row_names())}"
            )
        for row in FAMILIES.get(name, (name,)):
            chosen[row] = val if row.endswith("_val") else train
    for row, count in chosen.items():
        if count < 1:
            option = "--val" if row.endswith("_val") else "--train"
            raise ValueError(f"{row}: {count} pictures asked for; {option} must be at least 1")
    return chosen


def plan(
    root: Path, wanted: Mapping[str, int], seed: int, size: tuple[int, int], overwrite: bool = False
) -> list[Job]:
    """Prepare a folder and say which pictures are still to be painted into it.

    Args:
        root: becomes the dataset root.
        wanted: number of pictures by row of the table of datasets.
        size: (rows, columns).
        overwrite: delete what was painted otherwise before.

    Raises:
        ValueError: the size is too small, the seed negative, or the record is broken.
        FileExistsError: the folder holds other pictures; nothing has been changed then.
        OSError: the folder cannot be written.
    """
    check_size(size)
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if root.is_file():
        raise FileExistsError(f"{root} is a file; --output must name a folder")
    root.mkdir(parents=True, exist_ok=True)
    made = read_record(root)
    asked = {name: Painted(seed, size, count) for name, count in wanted.items()}
    stale = [
        name for name in asked if _is_stale(root, name, made.get(name), asked[name], overwrite)
    ]
    for name in stale:
        del made[name]
        _write_record(root, made)
        for folder in _folders(root, name):
            shutil.rmtree(folder)
    # Recorded before it is painted: an interrupted run is known as ours and goes on.
    _write_record(root, made | asked)
    jobs = []
    for name, count in wanted.items():
        recipe = Recipe.of(name, seed, size)
        for index in range(count):
            image, label = picture_paths(root, name, index)
            if not (image.is_file() and label.is_file()):
                jobs.append(Job(recipe, index, image, label))
    return jobs


def _is_stale(root: Path, name: str, made: Painted | None, asked: Painted, overwrite: bool) -> bool:
    """Whether painted pictures must go first; raises FileExistsError where they may not."""
    if made is None:
        filled = [folder for folder in _folders(root, name) if any(folder.rglob("*.*"))]
        if filled:
            raise FileExistsError(
                f"{filled[0]} holds files, and {root / RECORD} does not know them: they may be a "
                "real dataset. They stay as they are; choose another --output."
            )
        return False
    same = (made.seed, made.size, made.painter) == (asked.seed, asked.size, asked.painter)
    if same and made.count <= asked.count:
        return False
    if overwrite:
        return True
    raise FileExistsError(
        f"{name} in {root} has {made}; asked for are {asked}. Add --overwrite to delete it "
        "and paint it anew, or choose another --output."
    )


def _folders(root: Path, name: str) -> list[Path]:
    """The folders of a dataset's images and labels, as far as they exist."""
    return [root / folder for folder in folders(name) if (root / folder).is_dir()]


def run(jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Paint pictures in any number of processes; yields each job that is done."""
    if workers <= 1 or len(jobs) < 2:
        for job in jobs:
            yield _do(job)
        return
    # 'spawn': a forked process would inherit locks of OpenCV's and other libraries' threads.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=cv2.setNumThreads,
        initargs=(1,),
    )  # fmt: skip
    try:
        yield from pool.map(_do, jobs, chunksize=4)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _do(job: Job) -> Job:
    write_picture(job.recipe, job.index, job.image, job.label)
    return job


# ---------------------------------------------------------------------- the record
def read_record(root: Path) -> dict[str, Painted]:
    """What was painted under a dataset root, by row; empty where nothing was.

    Raises:
        ValueError: the record cannot be understood.
    """
    path = root / RECORD
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {
            str(name): Painted(
                int(entry["seed"]),
                (int(entry["size"][0]), int(entry["size"][1])),
                int(entry["count"]),
                int(entry["painter"]),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} is broken ({error!r}). It says what this tool has painted here; delete "
            f"the whole folder {root} if nothing else is in it, or choose another --output."
        ) from error


def _write_record(root: Path, made: Mapping[str, Painted]) -> None:
    entries = {name: asdict(painted) for name, painted in sorted(made.items())}
    with written_whole(root / RECORD, "w") as file:
        file.write(json.dumps(entries, indent=2) + "\n")
