"""First draft of a dataset's description, from its files: names, folders, coding and ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from clouds.data.datasets.description_file import IMAGE_SUFFIXES
from clouds.data.datasets.scan import scan_files
from clouds.data.label_space import IGNORE
from clouds.data.labels import MAX_RAW_ID, Channel, LabelFormat, LabelMapping, read_label
from clouds.data.reading import read_image, read_stored
from clouds.messages import format_examples

UInt8Array = npt.NDArray[np.uint8]
MAX_VALUES = 255
"""More different values in the label files are no ids of classes."""

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
_MAX_RED_ID = 100  # larger values in the red channel are colors
_EXAMPLES = 20  # images whose names are compared with those of all labels in their folder

_ANY_ID = LabelMapping("ids", {}, tuple(range(MAX_RAW_ID + 1)))


@dataclass(frozen=True)
class Naming:
    """How the names of image and label files differ; the rest of both is the same in a pair."""

    image_prefix: str
    image_suffix: str
    label_prefix: str
    label_suffix: str

    def image_key(self, path: str) -> str | None:
        """The common part of the path of an image; None: it has another form."""
        return _key(path, self.image_prefix, self.image_suffix)

    def label_key(self, path: str) -> str | None:
        """The common part of the path of a label; None: it has another form."""
        return _key(path, self.label_prefix, self.label_suffix)


@dataclass
class ValueCount:
    """Pixels of one value in the label files that were read.

    Attributes:
        pixels, images: number of its pixels, and of the files that have any.
        best: index of the file in which it has the largest share of the pixels.
        best_share: that share.
    """

    pixels: int = 0
    images: int = 0
    best: int = -1
    best_share: float = 0.0


@dataclass(frozen=True)
class Draft:
    """What the files of a dataset tell.

    Attributes:
        images, labels: the folders.
        namings: forms of the names, the most frequent one first; all with the same labels.
        pairs: image and label files, sorted.
        unpaired: numbers of images and of labels without partner.
        splits: subfolders that both folders have; empty: the pairs are in no such folders.
        channel: where the label files store ids.
        read: the pairs whose labels were read.
        counts: by value, ascending: an id, or a color as `read_values` returns it.
        num_pixels: pixels of the label files that were read.
    """

    images: Path
    labels: Path
    namings: tuple[Naming, ...]
    pairs: tuple[tuple[Path, Path], ...]
    unpaired: tuple[int, int]
    splits: tuple[str, ...]
    channel: Channel
    read: tuple[tuple[Path, Path], ...]
    counts: dict[int, ValueCount]
    num_pixels: int


def draft_of(
    images: Path,
    labels: Path,
    sample: int,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Draft:
    """Look at the files of a dataset.

    Args:
        images, labels: its two folders.
        sample: number of label files that are read, at equal distances; 0: all.
        progress: wraps the numbers of the files that are read.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no pairs, or label files that do not store ids.
    """
    image_files, label_files = _files(images), _files(labels)
    namings = _namings(image_files, label_files)
    paired: dict[str, tuple[Path, Path]] = {}
    by_key = {namings[0].label_key(path): path for path in label_files}
    for naming in namings:
        for path in image_files:
            key = naming.image_key(path)
            if key is not None and key in by_key:
                paired.setdefault(key, (images / path, labels / by_key[key]))
    pairs = tuple(paired[key] for key in sorted(paired))
    stride = max(1, len(pairs) // sample) if sample else 1
    read = pairs[::stride]
    channel = guess_channel([label for _, label in read[:_EXAMPLES]])
    counts: dict[int, ValueCount] = {}
    num_pixels = 0
    for i in progress(range(len(read))):
        values = read_values(read[i][1], channel)
        num_pixels += _count(counts, values, i)
        if len(counts) > MAX_VALUES:
            raise ValueError(
                f"{read[i][1]}: the labels have more than {MAX_VALUES} different "
                f"{'colors' if channel == 'color' else 'values'}, so they are not ids of classes. "
                "Instance ids, depths, and labels that were resized with interpolation or saved "
                "with loss look so; use the files with one id per class"
            )
    return Draft(
        images,
        labels,
        namings,
        pairs,
        (len(image_files) - len(pairs), len(label_files) - len(pairs)),
        _splits(paired),
        channel,
        read,
        dict(sorted(counts.items())),
        num_pixels,
    )


def read_values(path: Path, channel: Channel) -> npt.NDArray[np.integer]:
    """The ids (H, W) of a label file; with the channel 'color' 65536 red + 256 green + blue.

    Raises:
        FileNotFoundError, ValueError: as `read_label`.
    """
    if channel == "color":
        rgb = read_image(path, lossless=True).astype(np.int64)
        return np.asarray(rgb @ np.array([1 << 16, 1 << 8, 1]))
    return read_label(path, LabelFormat("", _ANY_ID, channel))


def guess_channel(labels: Sequence[Path]) -> Channel:
    """Where label files store their ids.

    Files with one channel, or three equal ones: 'index'. If blue is 0 everywhere and red small:
    'red'. Otherwise 'color'.

    Raises:
        FileNotFoundError, ValueError: as `read_stored`.
    """
    channels: list[Channel] = []
    for path in labels:
        pixels, _ = read_stored(path)
        if pixels.ndim == 2 or (pixels[..., :1] == pixels[..., 1:3]).all():
            channels.append("index")
        elif not pixels[..., 2].any() and pixels[..., 0].max() <= _MAX_RED_ID:
            channels.append("red")
        else:
            channels.append("color")
    for channel in ("color", "red"):  # files of one class may look like the others
        if channel in channels:
            return channel
    return "index"


def _files(folder: Path) -> list[str]:
    """Paths of the image files in a folder, relative to it, sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} (working directory: {Path.cwd()})")
    found = scan_files(folder, IMAGE_SUFFIXES).files.values()
    return sorted(Path(file[0]).relative_to(folder).as_posix() for file in found)


def _key(path: str, prefix: str, suffix: str) -> str | None:
    folder, slash, name = path.rpartition("/")
    if not name.startswith(prefix) or not name.lower().endswith(suffix.lower()):
        return None
    return folder + slash + name[len(prefix) : len(name) - len(suffix)]


def _namings(images: Sequence[str], labels: Sequence[str]) -> tuple[Naming, ...]:
    """The forms of names with most pairs, with the same labels.

    Raises:
        ValueError: there is no image, no label, or no pair.
    """
    for what, files in (("image", images), ("label", labels)):
        if not files:
            raise ValueError(
                f"the folder of {what}s has no {what} file; endings are {', '.join(IMAGE_SUFFIXES)}"
            )
    by_folder: dict[str, list[str]] = {}
    for label in labels:
        by_folder.setdefault(label.rpartition("/")[0], []).append(label.rpartition("/")[2])
    candidates: set[Naming] = set()
    for image in images[:: max(1, len(images) // _EXAMPLES)]:
        folder, _, name = image.rpartition("/")
        candidates |= _candidates(name, by_folder.get(folder, ()))
    keys = {naming: _keys(naming, images, labels) for naming in candidates}
    ranked = sorted(
        (naming for naming in candidates if keys[naming]),
        key=lambda n: (-len(keys[n]), sum(map(len, vars(n).values())), str(n)),
    )
    if not ranked:
        raise ValueError(
            "no image has a label of a similar name in the same subfolder: images are "
            f"{format_examples(images, 3)}, labels {format_examples(labels, 3)}. Give the folders "
            "below which both have the same subfolders"
        )
    best, known = ranked[0], set(keys[ranked[0]])
    chosen = [best]
    for naming in ranked[1:]:  # of other image files, such as .png beside .jpg
        if naming.label_key(labels[0]) is None or naming.label_suffix != best.label_suffix:
            continue
        if naming.label_prefix == best.label_prefix and not keys[naming] <= known:
            chosen.append(naming)
            known |= keys[naming]
    return tuple(chosen)


def _candidates(image: str, labels: Sequence[str]) -> set[Naming]:
    """Forms under which an image and the labels with the most similar names are pairs.

    That is those with the longest common start; if none has any, with the longest common end.
    """
    stem = PurePosixPath(image).stem
    stems = {label: PurePosixPath(label).stem for label in labels}
    starts = {label: _common_start(stem, other) for label, other in stems.items()}
    if any(starts.values()):
        return {
            Naming("", image[len(shared) :], "", label[len(shared) :])
            for label, shared in _longest(starts)
        }
    ends = {label: _common_start(stem[::-1], other[::-1]) for label, other in stems.items()}
    return {
        Naming(
            stem[: len(stem) - len(shared)],
            image[len(stem) :],
            stems[label][: len(stems[label]) - len(shared)],
            label[len(stems[label]) :],
        )
        for label, shared in _longest(ends)
    }


def _longest(shared: Mapping[str, str]) -> list[tuple[str, str]]:
    """The entries with the longest value, none if that is empty."""
    length = max(map(len, shared.values()), default=0)
    return [entry for entry in shared.items() if len(entry[1]) == length > 0]


def _common_start(first: str, second: str) -> str:
    same = [a == b for a, b in zip(first, second, strict=False)]
    return first[: same.index(False) if False in same else len(same)]


def _keys(naming: Naming, images: Sequence[str], labels: Sequence[str]) -> set[str]:
    found = {naming.image_key(path) for path in images} & {naming.label_key(p) for p in labels}
    return {key for key in found if key is not None and not key.endswith("/") and key}


def _splits(keys: Iterable[str]) -> tuple[str, ...]:
    """The subfolders of all pairs, if they have the names of splits."""
    folders = Counter(key.split("/")[0] if "/" in key else "" for key in keys)
    if not all(folder.lower() in SPLITS for folder in folders):
        return ()
    return tuple(sorted(folders, key=lambda folder: SPLITS.index(folder.lower())))


def _count(counts: dict[int, ValueCount], values: npt.NDArray[np.integer], number: int) -> int:
    """Count the values of file `number`; returns its number of pixels."""
    for value, pixels in zip(*np.unique(values, return_counts=True), strict=True):
        count = counts.setdefault(int(value), ValueCount())
        count.pixels += int(pixels)
        count.images += 1
        if pixels / values.size > count.best_share:
            count.best, count.best_share = number, float(pixels / values.size)
    return values.size


# ---------------------------------------------------------------------- the file
def value_name(draft: Draft, value: int) -> str:
    """A value as it is written in the description: an id, or a color [red, green, blue]."""
    return str(list(color_of(value))) if draft.channel == "color" else str(value)


def color_of(value: int) -> tuple[int, int, int]:
    """RGB of a value of `read_values` with the channel 'color'."""
    return value >> 16, value >> 8 & 255, value & 255


def shares(draft: Draft, value: int) -> str:
    """The share of a value as text."""
    count = draft.counts[value]
    pixels = 100 * count.pixels / draft.num_pixels
    return (
        f"{pixels:.3g} % of the pixels, in {100 * count.images / len(draft.read):.3g} % of images"
    )


def description_text(
    draft: Draft,
    name: str,
    folder: Path,
    sheet: str,
    further: Mapping[str, tuple[Path, Path]],
) -> str:
    """The YAML text of the draft; the names of the classes are empty.

    Args:
        draft: what the files tell.
        name: of the dataset.
        folder: folder of the file that is written; paths below it are relative to it.
        sheet: image file that shows each value.
        further: folders of images and labels of further splits, by name.
    """
    ignored = [IGNORE] if draft.channel != "color" and IGNORE in draft.counts else []
    entry = "color" if draft.channel == "color" else "ids"
    classes = [
        f"  - {{name: '', {entry}: {_entry(draft, value)}}}  # {shares(draft, value)}"
        for value in draft.counts
        if value not in ignored
    ]
    suffixes = [naming.image_suffix for naming in draft.namings]
    first = draft.namings[0]
    lines = [
        f"# Draft from {len(draft.pairs)} pairs, of which {len(draft.read)} labels were read.",
        f"# To do: write a name for each class; {sheet} shows them. A class may have several",
        "# ids; those of no class belong to ignore_ids.",
        f"name: {name}",
        *_folder_lines(draft, folder, further),
        f"image_suffixes: {json.dumps(suffixes, ensure_ascii=False)}",
        f"label_suffix: {_quoted(first.label_suffix)}",
        *([f"image_prefix: {_quoted(first.image_prefix)}"] if first.image_prefix else []),
        *([f"label_prefix: {_quoted(first.label_prefix)}"] if first.label_prefix else []),
        f"stored_as: {draft.channel}  # guessed",
        "classes:",
        *classes,
    ]
    if draft.channel == "color":
        lines.append("ignore_colors: []")
    else:
        lines.append(f"ignore_ids: {ignored or [IGNORE]}")
        if all(value < 19 or value == IGNORE for value in draft.counts):
            lines += [
                "# If these are Cityscapes' train ids, write instead of classes and ignore_ids:",
                "# label_space: cityscapes_19",
                "# ids: train_ids",
            ]
    return "\n".join([*lines, ""])


def _entry(draft: Draft, value: int) -> str:
    return value_name(draft, value) if draft.channel == "color" else f"[{value}]"


def _folder_lines(
    draft: Draft, folder: Path, further: Mapping[str, tuple[Path, Path]]
) -> list[str]:
    splits = {name: (draft.images / name, draft.labels / name) for name in draft.splits}
    if further:
        splits = (splits or {"train": (draft.images, draft.labels)}) | dict(further)
    if not splits:
        images, labels = (_relative(path, folder) for path in (draft.images, draft.labels))
        return [f"images: {images}", f"labels: {labels}"]
    lines = [
        f"  {name}: {{images: {_relative(images, folder)}, labels: {_relative(labels, folder)}}}"
        for name, (images, labels) in splits.items()
    ]
    return ["splits:", *lines]


def _relative(path: Path, folder: Path) -> str:
    """A path as YAML, relative to `folder` if it is in it."""
    path, folder = path.absolute(), folder.absolute()
    relative = path.relative_to(folder) if path.is_relative_to(folder) else path
    return _quoted(relative.as_posix())


def _quoted(text: str) -> str:
    """Text as YAML, with quotes where it is not made of common characters."""
    plain = all(c.isalnum() or c in "._-/" for c in text) and not text.startswith("-")
    return text if plain and text else json.dumps(text, ensure_ascii=False)
