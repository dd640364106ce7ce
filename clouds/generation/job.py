"""Fills a folder with generated images; resumes interrupted runs; several processes may share one.

    images/000000.png ...   image k is generated from prompt k modulo the number of prompts
    labels/000000.png ...   train ids, if the generator has labels or generates images for labels
    classes.yaml            the classes of labels, if they are not Cityscapes' 19
    manifest.jsonl          one line per finished image
    generation.json         the settings that all images of the folder have in common

Label, image and line are written in this order, each file under a temporary name first, so files of
an interrupted run are either complete or ignored. The seed of an image is a function of its number,
so images do not depend on interruptions or on the process that generates them. An image of one
color is drawn again with another seed, which is also a function of its number.
"""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.datasets.builtin import CLASSES_NAME, classes_text
from clouds.data.datasets.manifest import (
    APPROXIMATE,
    MANIFEST_NAME,
    Entry,
    append_entry,
    read_manifest,
)
from clouds.data.label_space import CITYSCAPES_19
from clouds.data.reading import is_one_color
from clouds.files import atomic_write, file_sha256, partial_files
from clouds.generation.condition import Condition, LabelConditions
from clouds.generation.generators import GeneratedImage, Generator, LabelConditioned
from clouds.version import __version__

logger = logging.getLogger(__name__)

RECORD = "generation.json"
SHEET = "contact_sheet.png"

_IMAGE_NAME = re.compile(r"\d{6,}\.png")

Record = dict[str, object]


@dataclass(frozen=True)
class GenerationJob:
    """The images to generate into the folder `output`.

    Attributes:
        prompts: used in turn.
        count: number of images.
        seed: image k is a function of this seed, k, its prompt and the generator.
        max_redraws: how often an image of one color is drawn again, with another seed. Safety
            checkers return such images, and models whose numbers overflow in half precision.
        conditions: labels that images are generated for; their classes are added to the prompts.

    Raises:
        ValueError: no prompt, no image, a negative number, or a generator that cannot generate
            images for these labels.
    """

    output: Path
    generator: Generator
    prompts: tuple[str, ...]
    count: int
    seed: int = 0
    max_redraws: int = 5
    conditions: LabelConditions | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there is no prompt to generate images from")
        if self.count < 1:
            raise ValueError(f"--count is {self.count}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must not be negative")
        if self.max_redraws < 0:
            raise ValueError(f"--max-redraws is {self.max_redraws}; it must not be negative")
        if self.conditions is not None:
            if not isinstance(self.generator, LabelConditioned):
                raise ValueError(
                    f"--condition: the generator {self.generator.name!r} cannot generate images "
                    "for labels; use stable_diffusion with --controlnet, or leave --condition out"
                )
            self.generator.check_conditions(self.conditions)

    @property
    def has_labels(self) -> bool:
        """Whether its images get labels."""
        return self.generator.has_labels or self.conditions is not None

    @property
    def manifest(self) -> Path:
        """The file with one line per finished image."""
        return self.output / MANIFEST_NAME

    def image_path(self, number: int) -> Path:
        return self.output / "images" / image_name(number)

    def label_path(self, number: int) -> Path:
        return self.output / "labels" / image_name(number)

    def request(self, number: int) -> Request:
        """What image `number` is generated from; raises as `LabelConditions`."""
        prompt = str(self.prompts[number % len(self.prompts)])
        if self.conditions is None:
            return Request(number, prompt, None)
        condition = self.conditions[number]
        prompt = condition.prompt(prompt, self.conditions.label_space)
        return Request(number, prompt, condition)

    def record(self) -> Record:
        """The settings that all images of the folder have in common, as JSON values."""
        height, width = self.generator.size
        conditions = self.conditions
        return {
            "generator": self.generator.name,
            "model": self.generator.model,
            "height": height,
            "width": width,
            **self.generator.settings,
            "seed": self.seed,
            "prompts": [str(prompt) for prompt in self.prompts],
            **({} if conditions is None else conditions.settings),
        }


@dataclass(frozen=True)
class Request:
    """One image to generate: its number, its prompt and the label that it is generated for."""

    number: int
    prompt: str
    condition: Condition | None


def image_name(number: int) -> str:
    """File name of an image."""
    return f"{number:06d}.png"


def image_seed(seed: int, number: int, redraw: int = 0) -> int:
    """The seed of an image, below 2**63, a function of the job's seed and the image's number.

    Args:
        redraw: how many images of this number were drawn before.
    """
    entropy = (seed, number, redraw) if redraw else (seed, number)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------- preparation
def prepare(job: GenerationJob, overwrite: bool = False, verify: bool = False) -> None:
    """Prepare the folder; to be called once, before any process generates images.

    Args:
        overwrite: delete the images that were generated here before.
        verify: delete images whose hash differs from the manifest, so they are generated again.

    Raises:
        FileExistsError: the folder contains other images; nothing is changed then.
        ValueError: the folder's record or manifest is invalid.
        OSError: the folder cannot be written.
    """
    if job.output.is_file():
        raise FileExistsError(f"{job.output} is a file; --output must name a folder")
    record = read_record(job.output)
    if record is None:
        _check_empty(job)
    elif overwrite:
        _clear(job.output)
    elif found := differences(record, job.record()):
        raise FileExistsError(
            f"{job.output} was started with other settings: {'; '.join(found)}. Use the same "
            "settings to resume, another --output, or --overwrite to delete its images."
        )
    with explain_write_errors(job.output):
        for folder in ["images", "labels"][: 1 + job.has_labels]:
            (job.output / folder).mkdir(parents=True, exist_ok=True)
        if job.conditions is not None:
            _write_classes(job.output / CLASSES_NAME, job.conditions)
        entries = _finished(job)
        last = max((int(name[:-4]) for name in entries), default=-1)
        if last >= job.count:
            raise FileExistsError(
                f"{job.output} has {len(entries)} images, up to {image_name(last)}, and --count is "
                f"{job.count}. Use --count {last + 1} or more, another --output, or --overwrite."
            )
        _drop_unfinished(job, entries)
        if verify:
            for name, entry in entries.items():
                image = job.output / "images" / name
                if image.is_file() and file_sha256(image) != entry.sha256:
                    image.unlink()
        with atomic_write(job.output / RECORD) as file:
            written = {"clouds": __version__} | job.record()
            text = json.dumps(written, indent=1, ensure_ascii=False) + "\n"
            file.write(text.encode("utf-8", "backslashreplace"))  # escapes of JSON, too


def _write_classes(path: Path, conditions: LabelConditions) -> None:
    """Write the classes of the labels, if they are not all 19 of Cityscapes."""
    space, labelled = conditions.label_space, conditions.dataset.classes_present
    if space == CITYSCAPES_19 and len(labelled) == space.num_classes:
        return
    with atomic_write(path) as file:
        file.write(classes_text(space, labelled).encode())


def read_record(output: Path) -> Record | None:
    """The settings of the images in a folder; None if nothing was generated there.

    Raises:
        ValueError: the record is invalid.
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
            f"{path} is broken ({record!r}). It records the settings of the images in this "
            f"folder; delete the folder {output} if it contains nothing else, or choose another "
            "--output."
        )
    record.pop("clouds", None)
    return record


def differences(recorded: Record, requested: Record) -> list[str]:
    """The differences between two records, one phrase each."""
    found = []
    for key in [*requested, *(key for key in recorded if key not in requested)]:
        old, new = recorded.get(key), requested.get(key)
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


def _check_empty(job: GenerationJob) -> None:
    for name in ("images", "labels", MANIFEST_NAME):
        path = job.output / name
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileExistsError(
                f"{path} exists, but {job.output / RECORD} with its settings does not. Nothing was "
                "changed; choose another --output."
            )


def _clear(output: Path) -> None:
    """Delete the files that this module has written, the manifest first."""
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    (output / SHEET).unlink(missing_ok=True)
    (output / CLASSES_NAME).unlink(missing_ok=True)
    for path in _generated_files(output):
        path.unlink()


def _drop_unfinished(job: GenerationJob, entries: dict[str, Entry]) -> None:
    """Delete partial files of an interrupted run, and files without a line in the manifest."""
    for path in _generated_files(job.output):
        if path.name not in entries:
            path.unlink()
    for folder in (job.output, job.output / "images", job.output / "labels"):
        for path in partial_files(folder):
            path.unlink(missing_ok=True)


def _generated_files(output: Path) -> list[Path]:
    paths = [path for name in ("images", "labels") for path in (output / name).glob("*.png")]
    return [path for path in paths if _IMAGE_NAME.fullmatch(path.name)]


# ---------------------------------------------------------------------- generation
def remaining(job: GenerationJob, rank: int = 0, world_size: int = 1) -> list[int]:
    """Numbers of the missing images among this process's share, every `world_size`-th image."""
    entries = _finished(job)
    return [
        number
        for number in range(rank, job.count, world_size)
        if not (
            image_name(number) in entries
            and job.image_path(number).is_file()
            and (not job.has_labels or job.label_path(number).is_file())
        )
    ]


def generate(job: GenerationJob, numbers: Sequence[int]) -> Iterator[int]:
    """Generate images; yields each number when its image is finished.

    Raises:
        OSError: an image cannot be written, such as on a full disk; the message says what to do.
        ValueError: an image has one color in all of its draws, or a label has no class.
    """
    step = job.generator.batch_size
    for start in range(0, len(numbers), step):
        batch = [job.request(number) for number in numbers[start : start + step]]
        for request, image in zip(batch, _draw(job, batch), strict=True):
            _write(job, request, *_redraw_while_one_color(job, request, image))
            yield request.number


def _draw(job: GenerationJob, batch: Sequence[Request], redraw: int = 0) -> list[GeneratedImage]:
    prompts = [request.prompt for request in batch]
    seeds = [image_seed(job.seed, request.number, redraw) for request in batch]
    conditions = [r.condition for r in batch if r.condition is not None]
    if not conditions:
        return job.generator.generate(prompts, seeds)
    assert isinstance(job.generator, LabelConditioned)  # checked by GenerationJob
    return job.generator.generate_for_labels(prompts, seeds, conditions)


def _redraw_while_one_color(
    job: GenerationJob, request: Request, image: GeneratedImage
) -> tuple[GeneratedImage, int]:
    """An image that has more than one color, and the number of images drawn before it."""
    redraws = 0
    while is_one_color(image.image):
        what = (
            f"{image_name(request.number)} of the prompt {request.prompt!r} has only the color "
            f"{tuple(image.image[0, 0].tolist())} (RGB)"
        )
        if redraws == job.max_redraws:
            raise ValueError(
                f"image {what}, and so have all of its {redraws + 1} draws. If a safety checker of "
                "the model refuses the prompt, change it; if numbers overflow in half precision, "
                "use --dtype bfloat16 or float32. --max-redraws allows more draws."
            )
        redraws += 1
        logger.warning("image %s; it is drawn again (%d of %d)", what, redraws, job.max_redraws)
        (image,) = _draw(job, [request], redraws)
    return image, redraws


def _write(job: GenerationJob, request: Request, generated: GeneratedImage, redraws: int) -> None:
    """Write label, image and manifest line, in this order: images with a line are complete."""
    number, condition = request.number, request.condition
    path = job.image_path(number)
    with explain_write_errors(path):
        if generated.label is not None:
            write_png(job.label_path(number), generated.label)
        write_png(path, cv2.cvtColor(generated.image, cv2.COLOR_RGB2BGR))
        entry = Entry(
            file=image_name(number),
            prompt=request.prompt,
            seed=image_seed(job.seed, number, redraws),
            generator=job.generator.name,
            model=job.generator.model,
            height=generated.image.shape[0],
            width=generated.image.shape[1],
            sha256=file_sha256(path),
            redraws=redraws,
            labels=APPROXIMATE if generated.approximate else "",
            condition="" if condition is None else condition.file.name,
        )
        append_entry(job.manifest, entry)


def write_png(path: Path, image: npt.NDArray[np.generic]) -> None:
    """Write an image, (H, W) or (H, W, 3) BGR."""
    done, data = cv2.imencode(".png", image)
    assert done, "OpenCV cannot encode PNG"
    with atomic_write(path, parents=False) as file:
        file.write(data)


def _finished(job: GenerationJob) -> dict[str, Entry]:
    return read_manifest(job.manifest) if job.manifest.is_file() else {}


def num_redrawn(job: GenerationJob) -> int:
    """Number of the images that had one color when they were drawn first."""
    return sum(entry.redraws > 0 for entry in _finished(job).values())


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Add the path and advice to the error of a file that cannot be written."""
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
            "the same command again: it keeps the finished images and resumes after them",
        ) from error
