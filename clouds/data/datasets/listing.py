"""The files of a dataset on disk: pairs of image and label, and files without a partner.

A listing is kept in memory and repeated when the modification time of a scanned folder or of the
manifest has changed. After overwriting an image or a label in place, call `forget_listings`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from clouds.data.datasets.description import DatasetDescription, Folders
from clouds.data.datasets.manifest import APPROXIMATE, Entry, read_manifest
from clouds.data.datasets.scan import Scan, UnusedFolder, modified, same_files, scan_files
from clouds.data.labels import LabelFormat
from clouds.data.reading import read_size
from clouds.data.structures import Record
from clouds.messages import format_examples

logger = logging.getLogger(__name__)

SAME_IMAGES = (
    "%d images are listed twice, by links to the same file, and count twice: %s. Remove the links "
    "if this is not meant"
)
"""Message: number, and examples."""

_HEADER_THREADS = 8  # reading headers waits for the disk, not for the processor

_Fingerprint = tuple[tuple[str, int], ...]
"""Each scanned folder, and the manifest, with its modification time in ns; -1: does not exist."""


@dataclass(frozen=True)
class Manifest:
    """Content of a manifest, and its differences from the folder of images.

    Attributes:
        path: the file.
        entries: by `Entry.file`; empty when the file cannot be read.
        error: why it cannot be read; empty when it can.
        unlisted_images: images without an entry, sorted.
        missing_files: `file` of the entries whose image does not exist, sorted.
    """

    path: Path
    entries: Mapping[str, Entry]
    error: str
    unlisted_images: tuple[Path, ...]
    missing_files: tuple[str, ...]

    def entry(self, image: Path, images: Path) -> Entry | None:
        """The entry of a file in the folder `images`, if it has one."""
        return self.entries.get(image.relative_to(images).as_posix())


@dataclass(frozen=True)
class Listing:
    """The files of one dataset.

    Attributes:
        images, labels: the two folders.
        has_images, has_labels: whether they exist.
        records: complete pairs (all images, when labels are not required), sorted by path.
        images_without_label, labels_without_image: files that have no partner, sorted.
        skipped: images left out because their label has another size, sorted.
        manifest: of generated images; None when there is none.
        missing: files of the records that do not exist, of a registered dataset.
        unusable: a line per path in the two folders that is no regular file, leads nowhere or is a
            folder that cannot be read.
        unused: files in the two folders that are in none of the lists above.
        unused_folders: hidden folders in them, and those of other programs.
        second_files: a line per unused file of which another one with the same name, up to the
            ending, is used.
        same_images, same_labels: a line per file that is, by a link, the same as one before it.
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
    missing: tuple[Path, ...] = ()
    unusable: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    unused_folders: tuple[UnusedFolder, ...] = ()
    second_files: tuple[str, ...] = ()
    same_images: tuple[str, ...] = ()
    same_labels: tuple[str, ...] = ()


_listings: dict[tuple[Path, str], tuple[DatasetDescription, _Fingerprint, Listing]] = {}
_registered: dict[str, tuple[DatasetDescription, Callable[[], object], Listing]] = {}


def forget_listings() -> None:
    """Clear the listings kept in memory."""
    _listings.clear()
    _registered.clear()


def list_registered(
    description: DatasetDescription, function: Callable[[], object], make: Callable[[], Listing]
) -> Listing:
    """The listing of a registered dataset: `make()` at the first call with these two."""
    kept = _registered.get(description.name)
    if kept is None or kept[0] != description or kept[1] is not function:
        kept = description, function, make()
        _registered[description.name] = kept
    return kept[2]


def list_dataset(description: DatasetDescription, root: Path) -> Listing:
    """List the files of a dataset; missing folders or files raise nothing."""
    root = root.absolute()
    kept = _listings.get((root, description.name))
    # one name may have several descriptions: of different label spaces
    if (
        kept is not None
        and kept[0] == description
        and all(modified(path) == time for path, time in kept[1])
    ):
        return kept[2]
    fingerprint, listing = _scan(description, root)
    _listings[root, description.name] = description, fingerprint, listing
    return listing


def _scan(description: DatasetDescription, root: Path) -> tuple[_Fingerprint, Listing]:
    folders = _choose(description.folders, root)
    images_dir, labels_dir = root / folders.images, root / folders.labels
    manifest_path = root / description.manifest if description.manifest else None
    paths = [root / f for both in description.folders for f in (both.images, both.labels)]
    # times are taken before listing, so that a file added meanwhile makes the listing outdated
    times = {str(path): modified(str(path)) for path in paths}
    if manifest_path is not None:
        times[str(manifest_path)] = modified(str(manifest_path))
    formats = description.label_formats
    image_scan = scan_files(images_dir, description.image_suffixes, description.image_prefix)
    label_scan = scan_files(labels_dir, [f.suffix for f in formats], description.label_prefix)
    scans = image_scan, label_scan
    for scan in scans:
        times |= scan.times
    images = {key: Path(file.path) for key, file in image_scan.files.items()}
    labels = {
        key: (Path(file.path), formats[file.number]) for key, file in label_scan.files.items()
    }
    records, skipped = _pairs(description, images, labels), list[Path]()
    if description.size_mismatch == "skip":
        records, skipped = _skip_mismatches(description.name, records)
    manifest = None
    if manifest_path is not None and manifest_path.is_file():
        # read after the images were listed, since a line is written after its image
        manifest = _read_manifest(manifest_path, images_dir, [record.image for record in records])
        records = [_with_entry(record, manifest, images_dir) for record in records]
    second_files = _second_files(description, image_scan, label_scan)
    listing = Listing(
        images=images_dir,
        labels=labels_dir,
        has_images=images_dir.is_dir(),
        has_labels=labels_dir.is_dir(),
        records=tuple(records),
        images_without_label=tuple(images[key] for key in sorted(images.keys() - labels.keys())),
        labels_without_image=tuple(labels[key][0] for key in sorted(labels.keys() - images.keys())),
        skipped=tuple(skipped),
        manifest=manifest,
        unusable=tuple(dict.fromkeys(line for scan in scans for line in scan.unusable)),
        unused=_unused(image_scan, label_scan, labels_dir.is_relative_to(images_dir)),
        unused_folders=tuple(dict.fromkeys(f for scan in scans for f in scan.unused_folders)),
        second_files=second_files,
        same_images=same_files((f.path, f.identity) for f in image_scan.files.values()),
        same_labels=same_files((f.path, f.identity) for f in label_scan.files.values()),
    )
    repeated = list(dict.fromkeys(line for scan in scans for line in scan.repeated))
    _log_surprises(description.name, listing, repeated)
    return tuple(times.items()), listing


def _pairs(
    description: DatasetDescription,
    images: Mapping[str, Path],
    labels: Mapping[str, tuple[Path, LabelFormat]],
) -> list[Record]:
    """Images with their labels, by their keys, sorted."""
    records = []
    for key, image in sorted(images.items()):
        label, label_format = labels.get(key, (None, None))
        if label is not None or not description.labels_required:
            records.append(Record(image, label, description.domain, description.name, label_format))
    return records


def _second_files(description: DatasetDescription, images: Scan, labels: Scan) -> tuple[str, ...]:
    """The lines `Listing.second_files`.

    Labels of one image in several formats are no second files: the order of the formats is that of
    their preference.
    """
    ids = [format_.ids for format_ in description.label_formats]
    lines = [
        f"{scan.files[key].path}, not {other.path}"
        for scan, groups in ((images, [None] * len(description.image_suffixes)), (labels, ids))
        for key, others in scan.others.items()
        for other in others
        if groups[other.number] == groups[scan.files[key].number]
    ]
    return tuple(dict.fromkeys(lines))


def _unused(images: Scan, labels: Scan, overlap: bool) -> tuple[str, ...]:
    """Files that are not used; `overlap`: the labels are in the folder of images, or below."""
    unused = [file.path for scan in (images, labels) for s in scan.others.values() for file in s]
    unused = images.unused + labels.unused + unused
    if overlap:
        used = {file.path for scan in (images, labels) for file in scan.files.values()}
        unused = [path for path in dict.fromkeys(unused) if path not in used]
    return tuple(unused)


def _log_surprises(name: str, listing: Listing, repeated: Sequence[str]) -> None:
    """Log what changes the images of a dataset in a way that may not be meant."""
    top = os.path.join(listing.images, "")  # noqa: PTH118
    visible = [
        path
        for path in listing.unused
        if path.startswith(top) and not os.path.basename(path).startswith(".")  # noqa: PTH119
    ]
    for level, lines, message in (
        (logging.WARNING, repeated, "left out %d links to folders that are listed already: %s"),
        (
            logging.WARNING,
            listing.second_files,
            "%d files have the name of another one, but for the ending; used are %s. Remove or "
            "rename those that are wrong",
        ),
        (logging.WARNING, listing.same_images, SAME_IMAGES),
        (logging.INFO, visible, "%d files in the folder of images are not used: %s"),
    ):
        if lines:
            text = message % (len(lines), format_examples(lines))
            logger.log(level, "%s: %s", name, text)


def _choose(alternatives: Sequence[Folders], root: Path) -> Folders:
    """The alternative with most existing folders, the earlier one of equals."""
    return max(alternatives, key=lambda f: ((root / f.images).is_dir(), (root / f.labels).is_dir()))


def _skip_mismatches(name: str, records: list[Record]) -> tuple[list[Record], list[Path]]:
    """Leave out the pairs whose image and label differ in size, by their headers."""
    logger.info("%s: comparing the sizes of %d images and labels", name, len(records))
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        same = list(pool.map(_same_size, records, chunksize=64))
    kept = [record for record, is_same in zip(records, same, strict=True) if is_same]
    skipped = [record.image for record, is_same in zip(records, same, strict=True) if not is_same]
    if skipped:
        logger.warning(
            "%s: skipped %d of %d pairs whose image and label differ in size: %s",
            name,
            len(skipped),
            len(records),
            format_examples([path.name for path in skipped]),
        )
    return kept, skipped


def _same_size(record: Record) -> bool:
    assert record.label is not None
    try:
        return read_size(record.image) == read_size(record.label)
    except ValueError:
        # a broken file is not a size mismatch: the pair is kept, and reading it raises
        return True


def _read_manifest(path: Path, folder: Path, images: Sequence[Path]) -> Manifest:
    try:
        entries = read_manifest(path)
    except ValueError as error:
        return Manifest(path, {}, str(error), (), ())
    files = {image.relative_to(folder).as_posix(): image for image in images}
    unlisted = sorted(files.keys() - entries.keys())
    # an image may have been added since the folder was listed
    missing = sorted(f for f in entries.keys() - files.keys() if not (folder / f).is_file())
    return Manifest(path, entries, "", tuple(files[f] for f in unlisted), tuple(missing))


def _with_entry(record: Record, manifest: Manifest, folder: Path) -> Record:
    entry = manifest.entry(record.image, folder)
    if entry is None:
        return record
    return replace(
        record,
        manifest_size=(entry.height, entry.width),
        approximate_label=entry.labels == APPROXIMATE,
    )
