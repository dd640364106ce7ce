"""What the command line predicts: image files, folders, patterns, videos, cameras."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clouds.files import expand_user

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"),
    *(".webp", ".ppm", ".pgm"),
)
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

VIDEO_KINDS = ("color", "overlay")
"""Images of which a video is written for a video."""


@dataclass(frozen=True)
class Input:
    """One image, video or camera.

    Attributes:
        source: a file; or the number of a camera.
        name: first part of the names of its outputs, different for every input.
    """

    source: Path | int
    name: str

    @property
    def is_video(self) -> bool:
        """Whether it is a video or a camera."""
        return isinstance(self.source, int) or self.source.suffix.lower() in VIDEO_SUFFIXES

    def outputs(self, folder: Path, kinds: Iterable[str]) -> dict[str, Path]:
        """Kind -> its file; those kinds that are written for it."""
        if self.is_video:
            return {k: folder / f"{self.name}_{k}.mp4" for k in kinds if k in VIDEO_KINDS}
        return {kind: folder / f"{self.name}_{kind}.png" for kind in kinds}


def find_inputs(words: Sequence[str]) -> list[Input]:
    """The inputs that words of a command line name, in their order, each file once.

    Args:
        words: an image or video file; a folder: the image files in it, not those in its
            subfolders; a pattern with * ? or []: the image and video files that match, where **
            stands for any folders; a number that is no file: a camera.

    Raises:
        ValueError: a word names nothing.
    """
    once: dict[Path | int, Path | int] = {}
    for word in words:
        for source in _sources(word):
            once.setdefault(source if isinstance(source, int) else _real(source), source)
    sources = list(once.values())
    stems = [f"camera{source}" if isinstance(source, int) else source.stem for source in sources]
    names = different_names(stems)
    return [Input(source, name) for source, name in zip(sources, names, strict=True)]


def find_tree(folder: Path) -> list[Input]:
    """All images below a folder; the name of each is its path there, without the suffix.

    Raises:
        ValueError: it is no folder, or there is no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is no folder; one with images in it or below is expected")
    files = _files(folder.rglob("*"), IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"there is no image file ({', '.join(IMAGE_SUFFIXES)}) below '{folder}'")
    names = different_names([f.relative_to(folder).with_suffix("").as_posix() for f in files])
    return [Input(file, name) for file, name in zip(files, names, strict=True)]


def _sources(word: str) -> list[Path] | list[int]:
    path = expand_user(word)
    if path.is_dir():
        files = _files(path.iterdir(), IMAGE_SUFFIXES)
        if not files:
            raise ValueError(
                f"input '{word}' is a folder without image files ({', '.join(IMAGE_SUFFIXES)}); "
                f"its subfolders are not searched. For those use a pattern: '{word}/**/*.png'."
            )
        return files
    if path.exists():
        return [path]
    if word.isascii() and word.isdigit():
        return [int(word)]
    if glob.has_magic(word):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - also absolute patterns
        files = _files(map(Path, matches), IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        if not files:
            raise ValueError(f"input '{word}' is a pattern that matches no image or video file.")
        return files
    raise ValueError(
        f"input '{word}' does not exist; allowed are image and video files, folders, patterns, and "
        "camera numbers. KEY VALUE overrides come after a flag with one value, or after '--'."
    )


def _files(paths: Iterable[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """What is visible, has one of the suffixes and is no folder, sorted.

    Links that lead nowhere, FIFOs and devices are among it, so that they are named when they cannot
    be read.
    """
    return sorted(
        p
        for p in paths
        if p.suffix.lower() in suffixes and not p.name.startswith(".") and not p.is_dir()
    )


def _real(path: Path) -> Path:
    """The file that links lead to; `Path.resolve` raises an error for links in a circle."""
    return Path(os.path.realpath(path))


def different_names(stems: Sequence[str]) -> list[str]:
    """`stems`, a repeated one with a number: a, a_2. Upper and lower case are the same."""
    reserved = {stem.lower() for stem in stems}
    taken: set[str] = set()
    names = []
    for stem in stems:
        name, number = stem, 1
        while name.lower() in taken or (number > 1 and name.lower() in reserved):
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def check_outputs(inputs: Sequence[Input], folder: Path, kinds: Sequence[str]) -> None:
    """Check, before anything is written, that outputs exist and replace no input.

    Raises:
        ValueError: an output is an input; a video is given and no kind that is written for videos.
    """
    files = {_real(i.source) for i in inputs if isinstance(i.source, Path)}
    for item in inputs:
        outputs = item.outputs(folder, kinds)
        if not outputs:
            raise ValueError(
                f"input '{item.source}' is a video; for videos {' and '.join(VIDEO_KINDS)} are "
                f"written, and --save is {' '.join(kinds)}."
            )
        replaced = [path for path in outputs.values() if _real(path) in files]
        if replaced:
            raise ValueError(
                f"the output '{replaced[0]}' of '{item.source}' would replace an input; choose "
                "another folder with --output."
            )
