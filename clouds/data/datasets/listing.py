"""What of a dataset is on disk: pairs of image and label, and what has no partner.

A listing is kept in memory and made anew when a folder that it looked into has changed: the
modification time of a folder, in nanoseconds, changes when an entry is added, removed or renamed,
that of a manifest when a line is added.
The contents of the files have no part in a listing, save the sizes of images and labels where a
row says that pairs that differ are skipped; who overwrites such a file in place while the process
runs calls `forget_listings`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from clouds.data.datasets.description import Folders, Row
from clouds.data.datasets.manifest import Entry, read_manifest
from clouds.data.reading import read_size
from clouds.data.structures import Record

logger = logging.getLogger(__name__)

_HEADER_THREADS = 8  # reading headers waits for the disk, not for the processor

_Fingerprint = tuple[tuple[str, int], ...]
"""Each folder looked into, and a manifest, with its modification time in ns, or -1 when it does not
exist."""


@dataclass(frozen=True)
class Manifest:
    """What a folder's manifest says, and where the folder differs.

    Attributes:
        path: the file.
        entries: by `Entry.file`; empty when the file cannot be read.
        error: why it cannot; empty when it can.
        unknown: images that have no entry, sorted.
        gone: `file` of the entries whose image is not there, sorted.
    """

    path: Path
    entries: Mapping[str, Entry]
    error: str
    unknown: tuple[Path, ...]
    gone: tuple[str, ...]

    def entry(self, image: Path, images: Path) -> Entry | None:
        """The entry of a file in the folder `images`, if it has one."""
        return self.entries.get(image.relative_to(images).as_posix())


@dataclass(frozen=True)
class Listing:
    """What was found of one dataset.

    Attributes:
        images, labels: the two folders.
        has_images, has_labels: whether they exist.
        records: complete pairs (all images, when labels are not required), sorted by path.
        images_without_label, labels_without_image: files that have no partner, sorted.
        skipped: images left out because their label has another size, sorted.
        manifest: of generated images; None when there is none.
    """

    images: Path
    labels: Path
    has_images: bool
    has_labels: bool
    records: tuple[Record, ...]
    images_without_label: tuple[Path, ...]
    labels_without_image: tuple[Path, ...]
    skipped: tuple[Path, ...]
    manifest: Manifest | None = None


_listings: dict[tuple[Path, str], tuple[_Fingerprint, Listing]] = {}


def forget_listings() -> None:
    """Make every listing anew when it is next asked for."""
    _listings.clear()


def list_dataset(row: Row, root: Path) -> Listing:
    """Look what files of a dataset there are; raises nothing for what is missing.

    Args:
        row: the dataset.
        root: the dataset root.
    """
    root = root.absolute()
    kept = _listings.get((root, row.name))
    if kept is not None and all(_modified(folder) == when for folder, when in kept[0]):
        return kept[1]
    fingerprint, listing = _look(row, root)
    _listings[root, row.name] = fingerprint, listing
    return listing


def _look(row: Row, root: Path) -> tuple[_Fingerprint, Listing]:
    folders = _choose(row.folders, root)
    looked_into = [str(root / f) for both in row.folders for f in (both.images, both.labels)]
    images_dir, labels_dir = root / folders.images, root / folders.labels
    manifest_path = root / row.manifest if row.manifest else None
    # taken before listing, so that a file which comes in meanwhile makes the listing stale
    before = {folder: _modified(folder) for folder in looked_into}
    if manifest_path is not None:
        before[str(manifest_path)] = _modified(str(manifest_path))
    images = _by_key(images_dir, row.image_suffixes, before)
    labels = _by_key(labels_dir, [kind.suffix for kind in row.label_files], before)

    records = [
        Record(image, labels.get(key), row.domain, row.name)
        for key, image in sorted(images.items())
        if key in labels or not row.labels_required
    ]
    skipped: list[Path] = []
    if row.size_mismatch == "skip":
        records, skipped = _skip_mismatches(row.name, records)
    manifest = None
    if manifest_path is not None and manifest_path.is_file():
        # read after the images were listed, since a line is written after its image
        manifest = _read_manifest(manifest_path, images_dir, [record.image for record in records])
        records = [_with_size(record, manifest, images_dir) for record in records]
    listing = Listing(
        images=images_dir,
        labels=labels_dir,
        has_images=images_dir.is_dir(),
        has_labels=labels_dir.is_dir(),
        records=tuple(records),
        images_without_label=tuple(images[key] for key in sorted(images.keys() - labels.keys())),
        labels_without_image=tuple(labels[key] for key in sorted(labels.keys() - images.keys())),
        skipped=tuple(skipped),
        manifest=manifest,
    )
    return tuple(before.items()), listing


def _choose(alternatives: Sequence[Folders], root: Path) -> Folders:
    """The alternative of which most exists, the earlier one of equals."""

    def exists(folders: Folders) -> tuple[bool, bool]:
        return (root / folders.images).is_dir(), (root / folders.labels).is_dir()

    return max(alternatives, key=exists)


def _modified(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116 (called for each folder, often)
    except FileNotFoundError:
        return -1


def _by_key(top: Path, suffixes: Sequence[str], looked_into: dict[str, int]) -> dict[str, Path]:
    """The files below `top` by what pairs them: their path without the first fitting suffix.

    Where files of several suffixes have the same key, the one whose suffix comes first counts.
    Folders are added to `looked_into` with their modification time.
    """
    found: dict[str, tuple[int, Path]] = {}
    for folder, subfolders, names in os.walk(top, followlinks=True):
        for subfolder in subfolders:
            path = os.path.join(folder, subfolder)  # noqa: PTH118
            looked_into[path] = _modified(path)
        below = Path(folder).relative_to(top)
        for name in names:
            rank = next((i for i, end in enumerate(suffixes) if name.endswith(end)), None)
            if rank is None or name.startswith("."):
                continue
            key = (below / name[: -len(suffixes[rank])]).as_posix()
            if key not in found or rank < found[key][0]:
                found[key] = rank, Path(folder, name)
    return {key: path for key, (_, path) in found.items()}


def _skip_mismatches(name: str, records: list[Record]) -> tuple[list[Record], list[Path]]:
    """Leave out the pairs whose image and label differ in size, by their headers."""
    logger.info("%s: comparing the sizes of %d images and labels", name, len(records))
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        fits = list(pool.map(_same_size, records, chunksize=64))
    kept = [record for record, fit in zip(records, fits, strict=True) if fit]
    skipped = [record.image for record, fit in zip(records, fits, strict=True) if not fit]
    if skipped:
        logger.warning(
            "%s: skipped %d of %d pairs whose image and label differ in size: %s",
            name,
            len(skipped),
            len(records),
            some([path.name for path in skipped]),
        )
    return kept, skipped


def _same_size(record: Record) -> bool:
    assert record.label is not None
    try:
        return read_size(record.image) == read_size(record.label)
    except ValueError:
        # a broken file is not a pair of two sizes: it stays, and reading it raises
        return True


def _read_manifest(path: Path, images: Path, found: Sequence[Path]) -> Manifest:
    try:
        entries = read_manifest(path)
    except ValueError as error:
        return Manifest(path, {}, str(error), (), ())
    files = {image.relative_to(images).as_posix(): image for image in found}
    unknown = sorted(files.keys() - entries.keys())
    # an image may have come since the folder was listed
    gone = sorted(f for f in entries.keys() - files.keys() if not (images / f).is_file())
    return Manifest(path, entries, "", tuple(files[f] for f in unknown), tuple(gone))


def _with_size(record: Record, manifest: Manifest, images: Path) -> Record:
    entry = manifest.entry(record.image, images)
    return record if entry is None else replace(record, painted_size=(entry.height, entry.width))


def some(items: Sequence[object], most: int = 5) -> str:
    """The first few of `items`, for a message."""
    rest = len(items) - most
    return ", ".join(str(i) for i in items[:most]) + (f" and {rest} more" if rest > 0 else "")
