"""Fills a folder with generated images; goes on where a killed run was; shares work over processes.

    images/000000.png …     what the generator painted: image k from prompt k modulo their number
    labels/000000.png …     train ids, where the generator knows them; only to measure by
    manifest.jsonl          one line for every image that is finished
    generation.json         what all images of the folder have in common

A picture is finished when the manifest has its line. Label, image and line are written in this
order, files under another name first, so whatever a killed process leaves behind is either whole or
not looked at. Every image has a seed of its own, a function of its number, so it is the same
whether the run was broken or not and whichever process paints it.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.datasets.manifest import (
    MANIFEST_NAME,
    Entry,
    append_entry,
    file_sha256,
    read_manifest,
)
from clouds.data.label_space import CITYSCAPES_19
from clouds.data.reading import read_image, read_label
from clouds.files import unfinished, written_whole
from clouds.generation.generators import Generator, Picture
from clouds.version import __version__
from clouds.visualizer import Tile, side_by_side

RECORD = "generation.json"
SHEET = "contact_sheet.png"

_OUR_NAME = re.compile(r"\d{6,}\.png")

Record = dict[str, object]
UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """What a folder is to be filled with.

    Attributes:
        output: the folder.
        generator: what paints.
        prompts: taken in turn.
        count: number of images.
        seed: images are a function of it, their number, their prompt and the generator.

    Raises:
        ValueError: no prompt, no image, or a negative seed.
    """

    output: Path
    generator: Generator
    prompts: tuple[str, ...]
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there is no prompt to paint from")
        if self.count < 1:
            raise ValueError(f"--count is {self.count}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must not be negative")

    @property
    def manifest(self) -> Path:
        """The file with a line for every finished image."""
        return self.output / MANIFEST_NAME

    def image(self, number: int) -> Path:
        """The file of an image."""
        return self.output / "images" / image_name(number)

    def label(self, number: int) -> Path:
        """The file of its label."""
        return self.output / "labels" / image_name(number)

    def prompt(self, number: int) -> str:
        """What an image is painted from."""
        return str(self.prompts[number % len(self.prompts)])

    def record(self) -> Record:
        """All that the images of the folder have in common, as JSON holds it."""
        rows, columns = self.generator.size
        return {
            "generator": self.generator.name,
            "model": self.generator.model,
            "height": rows,
            "width": columns,
            **self.generator.settings,
            "seed": self.seed,
            "prompts": [str(prompt) for prompt in self.prompts],
        }


def image_name(number: int) -> str:
    """File name of an image; a function of its number alone."""
    return f"{number:06d}.png"


def image_seed(seed: int, number: int) -> int:
    """The seed of an image, below 2**63: a function of the run's seed and its number."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------- before painting
def prepare(plan: Plan, overwrite: bool = False, verify: bool = False) -> None:
    """Make the folder ready; to be called once, before any process paints.

    Args:
        overwrite: delete what was generated here before, whatever it is.
        verify: compare every image with the manifest's hash; those that differ are painted again.

    Raises:
        FileExistsError: the folder holds other images. Nothing has been changed then.
        ValueError: the folder's record or manifest is broken.
        OSError: the folder cannot be written.
    """
    if plan.output.is_file():
        raise FileExistsError(f"{plan.output} is a file; --output must name a folder")
    made = read_record(plan.output)
    if made is None:
        _check_empty(plan)
    elif overwrite:
        _clear(plan.output)
    else:
        _check_same(plan, made)
    with _errors_named(plan.output):
        for folder in ["images", "labels"][: 1 + plan.generator.labelled]:
            (plan.output / folder).mkdir(parents=True, exist_ok=True)
        entries = _finished(plan)
        _check_count(plan, len(entries), max((int(name[:-4]) for name in entries), default=-1))
        _drop_unfinished(plan, entries)
        if verify:
            for name, entry in entries.items():
                image = plan.output / "images" / name
                if image.is_file() and file_sha256(image) != entry.sha256:
                    image.unlink()
        with written_whole(plan.output / RECORD, "w") as file:
            record = {"clouds": __version__} | plan.record()
            file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_record(output: Path) -> Record | None:
    """What was generated in a folder; None where nothing was.

    Raises:
        ValueError: the record is broken.
    """
    path = output / RECORD
    if not path.is_file():
        return None
    record: object
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        record = error
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} is broken ({record!r}). It says what the images beside it were made "
            f"with; delete the whole folder {output} if nothing else is in it, or choose another "
            "--output."
        )
    record.pop("clouds", None)
    return record


def differences(made: Record, asked: Record) -> list[str]:
    """What two records disagree about, one phrase each."""
    found = []
    for key in [*asked, *(key for key in made if key not in asked)]:
        old, new = made.get(key), asked.get(key)
        if old == new:
            continue
        if key == "prompts" and isinstance(old, list) and isinstance(new, list):
            found.append(_prompt_difference(old, new))
        else:
            found.append(f"{key} was {old!r} and is now {new!r}")
    return found


def _prompt_difference(old: list[object], new: list[object]) -> str:
    if len(old) != len(new):
        return f"there were {len(old)} prompts and are now {len(new)}"
    number = next(i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
    return f"prompt {number + 1} was {old[number]!r} and is now {new[number]!r}"


def _check_empty(plan: Plan) -> None:
    for name in ("images", "labels", MANIFEST_NAME):
        path = plan.output / name
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileExistsError(
                f"{path} is there, but {plan.output / RECORD}, which says what it was made with, "
                "is not. It stays as it is; choose another --output."
            )


def _check_same(plan: Plan, made: Record) -> None:
    found = differences(made, plan.record())
    if found:
        raise FileExistsError(
            f"{plan.output} was begun with other settings: {'; '.join(found)}. Use the same "
            "settings to go on, another --output, or --overwrite to delete its images."
        )


def _check_count(plan: Plan, finished: int, last: int) -> None:
    if last >= plan.count:
        raise FileExistsError(
            f"{plan.output} has {finished} images, up to {image_name(last)}, and --count is "
            f"{plan.count}. Use --count {last + 1} or more, another --output, or --overwrite."
        )


def _clear(output: Path) -> None:
    """Delete what this module has written, the manifest first; nothing else."""
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    (output / SHEET).unlink(missing_ok=True)
    for path in _our_files(output):
        path.unlink()


def _drop_unfinished(plan: Plan, entries: dict[str, Entry]) -> None:
    """Delete what a killed run has left half-written or without a line in the manifest."""
    for path in _our_files(plan.output):
        if path.name not in entries:
            path.unlink()
    for folder in (plan.output, plan.output / "images", plan.output / "labels"):
        for path in unfinished(folder):
            path.unlink(missing_ok=True)


def _our_files(output: Path) -> list[Path]:
    paths = [path for name in ("images", "labels") for path in (output / name).glob("*.png")]
    return [path for path in paths if _OUR_NAME.fullmatch(path.name)]


# ---------------------------------------------------------------------- painting
def remaining(plan: Plan, rank: int = 0, world_size: int = 1) -> list[int]:
    """Numbers of the images that this process has still to paint: its share is every W-th."""
    entries = _finished(plan)
    return [
        number
        for number in range(rank, plan.count, world_size)
        if not (
            image_name(number) in entries
            and plan.image(number).is_file()
            and (not plan.generator.labelled or plan.label(number).is_file())
        )
    ]


def paint(plan: Plan, numbers: Sequence[int]) -> Iterator[int]:
    """Paint images; yields each number once its image is finished.

    Raises:
        OSError: an image cannot be written, such as on a full disk; the message says what to do.
    """
    step = plan.generator.batch_size
    for start in range(0, len(numbers), step):
        batch = numbers[start : start + step]
        pictures = plan.generator.generate(
            [plan.prompt(number) for number in batch],
            [image_seed(plan.seed, number) for number in batch],
        )
        for number, picture in zip(batch, pictures, strict=True):
            _write(plan, number, picture)
            yield number


def _write(plan: Plan, number: int, picture: Picture) -> None:
    """Label, image, line: in this order, so that what has a line is complete on the disk."""
    path = plan.image(number)
    with _errors_named(path):
        if picture.label is not None:
            _write_png(plan.label(number), picture.label)
        _write_png(path, cv2.cvtColor(picture.image, cv2.COLOR_RGB2BGR))
        entry = Entry(
            file=image_name(number),
            prompt=plan.prompt(number),
            seed=image_seed(plan.seed, number),
            generator=plan.generator.name,
            model=plan.generator.model,
            height=picture.image.shape[0],
            width=picture.image.shape[1],
            sha256=file_sha256(path),
        )
        append_entry(plan.manifest, entry)


def _write_png(path: Path, picture: npt.NDArray[np.generic]) -> None:
    """Write a picture, (H, W) or (H, W, 3) BGR."""
    done, data = cv2.imencode(".png", picture)
    assert done, "OpenCV cannot encode PNG"
    with written_whole(path, parents=False) as file:
        file.write(data)


def _finished(plan: Plan) -> dict[str, Entry]:
    """The manifest's entries by file name."""
    return read_manifest(plan.manifest) if plan.manifest.is_file() else {}


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Say what to do about a file that cannot be written."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        advice = "Check the folder's permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Free some space or raise the quota"
        raise OSError(
            error.errno or errno.EIO,
            f"cannot write {error.filename or path}: {error.strerror or error}. {advice} and run "
            "the same command again: finished images are kept, and it goes on after them",
        ) from error


# ---------------------------------------------------------------------- after painting
def write_contact_sheet(plan: Plan, columns: int = 6, rows: int = 4, tile_width: int = 256) -> Path:
    """Show images from all over the folder, with the beginnings of their prompts over them.

    Where labels are known they stand below the images, in class colors.

    Returns:
        the file.
    """
    shown = min(plan.count, columns * rows)
    numbers = np.linspace(0, plan.count - 1, shown).round().astype(int).tolist()
    columns = min(columns, shown)
    title = f"{plan.output.name}: {plan.count} images, {plan.generator.name} {plan.generator.model}"
    panels: list[UInt8Array] = []
    for start in range(0, shown, columns):
        tiles = [_tile(plan, number, tile_width) for number in numbers[start : start + columns]]
        tiles += [Tile("", np.full((1, 1, 3), 255, np.uint8))] * (columns - len(tiles))
        last = start + columns >= shown and plan.generator.labelled
        panels.append(
            side_by_side(
                tiles,
                title="" if panels else title.strip(),
                legend=tuple(range(CITYSCAPES_19.num_classes)) if last else (),
                tile_width=tile_width,
            )
        )
    path = plan.output / SHEET
    sheet = cv2.cvtColor(np.vstack(panels), cv2.COLOR_RGB2BGR)
    with _errors_named(path):
        _write_png(path, sheet)
    return path


def _tile(plan: Plan, number: int, width: int) -> Tile:
    image = read_image(plan.image(number))
    size = (width, max(1, round(width * image.shape[0] / image.shape[1])))
    picture = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if plan.generator.labelled:
        label = read_label(plan.label(number)).astype(np.uint8)
        # Colors of classes must not be averaged.
        small = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
        picture = np.vstack([picture, CITYSCAPES_19.colorize(np.asarray(small, np.uint8))])
    prompt, letters = plan.prompt(number), width // 7
    caption = prompt if len(prompt) <= letters else prompt[: letters - 1].rstrip() + "…"
    return Tile(caption, np.asarray(picture, np.uint8))
