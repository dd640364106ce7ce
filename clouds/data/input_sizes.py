"""Sizes into which evaluation images are fitted, by dataset, and those of published protocols."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

Size = tuple[int, int]
"""Pixels."""

_ENTRY = re.compile(r"\s*(?P<pattern>[^:\s]+)\s*:\s*(?P<long>[1-9]\d*)x(?P<short>[1-9]\d*)\s*")


@dataclass(frozen=True)
class InputSizes:
    """Sizes of the model's input by dataset.

    Attributes:
        sizes: pattern of names of datasets, long side and short side into which their images are
            fitted, keeping the ratio; the first pattern that matches applies.
        halved: patterns of datasets whose images and labels are halved beforehand.
        unnamed: long and short side for images of no dataset; None: they are not fitted.
    """

    sizes: tuple[tuple[str, Size], ...] = ()
    halved: tuple[str, ...] = ()
    unnamed: Size | None = None

    def of(self, dataset: str) -> Size | None:
        """Long and short side for a dataset; None: there is no size for it."""
        if not dataset:
            return self.unnamed
        return next((size for pattern, size in self.sizes if fnmatchcase(dataset, pattern)), None)

    def is_halved(self, dataset: str) -> bool:
        """Whether images and labels of a dataset are halved before anything else."""
        return any(fnmatchcase(dataset, pattern) for pattern in self.halved)

    def preceded_by(self, sizes: Sequence[tuple[str, Size]]) -> InputSizes:
        """A copy in which other sizes come first."""
        return replace(self, sizes=(*sizes, *self.sizes))


@dataclass(frozen=True)
class WindowProtocol:
    """A published protocol with sliding windows.

    Attributes:
        sizes: of the images that are divided into windows.
        window: side of a window, pixels.
        step: between windows, pixels.
    """

    sizes: InputSizes
    window: int
    step: int


_HALF, _FULL = (1024, 512), (2048, 1024)
_MAPILLARY = ("mapillary*",)

PUBLISHED: dict[str, WindowProtocol] = {
    "rein512": WindowProtocol(
        InputSizes(
            (
                ("cityscapes*", _HALF),
                ("bdd*", (1280, 720)),
                ("mapillary*", _HALF),
                ("acdc*", (960, 540)),
            ),
            _MAPILLARY,
            _HALF,
        ),
        512,
        341,
    ),
    "rein1024": WindowProtocol(
        InputSizes((("cityscapes*", _FULL), ("acdc*", (1920, 1080))), unnamed=_FULL), 1024, 683
    ),
    "soma512": WindowProtocol(
        InputSizes(
            (
                ("cityscapes*", _FULL),
                ("bdd*", (1280, 720)),
                ("mapillary*", _FULL),
                ("acdc*", (1920, 1080)),
            ),
            _MAPILLARY,
            _FULL,
        ),
        512,
        341,
    ),
    "soma1024": WindowProtocol(
        InputSizes(
            (
                ("cityscapes*", _FULL),
                ("bdd*", _FULL),
                ("mapillary*", _FULL),
                ("acdc*", (1920, 1080)),
            ),
            _MAPILLARY,
            _FULL,
        ),
        1024,
        683,
    ),
    "tqdm": WindowProtocol(
        InputSizes(
            (("cityscapes*", _FULL), ("bdd*", (1280, 720)), ("mapillary*", _FULL)), unnamed=_FULL
        ),
        512,
        341,
    ),
    "vltseg": WindowProtocol(InputSizes((("*", _HALF),), unnamed=_HALF), 512, 426),
}
"""Protocols of the papers' code, by the name in TEST.PROTOCOL. Scores of windows are averaged and
resized to the label, whose size is that of its file, or half of it for `halved` datasets."""


def fitted_size(height: int, width: int, size: Size) -> Size:
    """Height and width, at least 1, of an image fitted into a long and a short side."""
    scale = min(max(size) / max(height, width), min(size) / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def parse_sizes(entries: Sequence[str]) -> tuple[tuple[str, Size], ...]:
    """TEST.INPUT_SIZES: entries such as 'bdd_*: 1280x720', as `InputSizes.sizes`.

    Raises:
        ValueError: an entry has another form.
    """
    parsed = []
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(
                f"{entry!r} is no size of a dataset's images; write a name or a pattern, and long "
                "and short side in pixels, such as 'bdd_*: 1280x720'"
            )
        parsed.append((match["pattern"], (int(match["long"]), int(match["short"]))))
    return tuple(parsed)
