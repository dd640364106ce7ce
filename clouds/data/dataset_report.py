"""Check of the files of a dataset, for `clouds check-data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from clouds.data.datasets import DatasetSpec, Listing
from clouds.data.datasets.scan import files_beside
from clouds.data.label_statistics import LabelCounts, LabelStatistics, spread
from clouds.data.labels import read_label
from clouds.data.reading import DamagedImageError, is_one_color, read_image
from clouds.data.structures import Domain, Record
from clouds.files import file_sha256
from clouds.messages import format_examples

State = Literal["ok", "broken", "missing"]


DEFECTS = UNREADABLE, DAMAGED, OTHER_SIZE, UNKNOWN_IDS, NOT_AS_IN_MANIFEST, ONE_COLOR = (
    "files cannot be read",
    "JPEG files have damaged data",
    "labels of another size than their image",
    "labels with unknown ids",
    "images differ from the manifest",
    "generated images have only one color",
)
"""Defects of a pair of image and label, as text that follows their number."""


@dataclass
class DatasetReport:
    """Result of checking one dataset.

    Attributes:
        dataset: the dataset.
        listing: its files.
        num_opened: number of pairs that were read.
        defects: a line per file with a defect, by each of `DEFECTS`.
        unused: files in the folders of the dataset that are not used, without `unused_folders`.
        labels: counts over the labels that were read, without those with unknown ids.
    """

    dataset: DatasetSpec
    listing: Listing
    num_opened: int = 0
    defects: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in DEFECTS})
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.labels = LabelStatistics(self.dataset.label_space)

    @property
    def state(self) -> State:
        """'missing': there are neither images nor labels; 'broken': there is some problem."""
        if not self.listing.has_images and not self.listing.has_labels:
            return "missing"
        return "broken" if self.problems() else "ok"

    def problems(self) -> list[str]:
        """All problems, a sentence each."""
        missing = [f"no folder {path}" for path in self.dataset.missing_folders(self.listing)]
        gaps = []
        if not missing:
            gaps = self.dataset.gaps(self.listing) + self.dataset.manifest_gaps(self.listing)
        defects = [
            f"{len(lines)} {defect}: {format_examples(lines, 3)}"
            for defect, lines in self.defects.items()
            if lines
        ]
        return missing + gaps + defects + self.labels.errors(self._has_all_labels)

    @property
    def num_unused(self) -> int:
        """Number of files that are not used, also those in hidden and foreign folders."""
        return len(self.unused) + sum(f.num_files for f in self.listing.unused_folders)

    def notes(self) -> list[str]:
        """What is no problem but may not be meant, a sentence each."""
        listing = self.listing
        notes = [
            f"{len(lines)} {what}: {format_examples(lines, 3)}"
            for lines, what in (
                (listing.second_files, "files have the name of another one, but for the ending"),
                (listing.same_images, "images are listed twice, by links to the same file"),
                (listing.same_labels, "labels are listed twice, by links to the same file"),
            )
            if lines
        ]
        if self.unused:
            notes.append(f"{len(self.unused)} files are not used: {_by_ending(self.unused)}")
        if listing.unused_folders:
            folders = [f"{f.path} ({f.num_files} files)" for f in listing.unused_folders]
            notes.append(f"{len(folders)} folders are not used: {format_examples(folders)}")
        return notes + self.labels.warnings(self._has_all_labels)

    @property
    def _has_all_labels(self) -> bool:
        return self.labels.num_labels == sum(r.label is not None for r in self.listing.records)

    def share_labeled(self) -> float | None:
        """Share of the pixels of the labels that have a class, in [0, 1]; None: no label."""
        total = self.labels.num_pixels
        return float(self.labels.pixels.sum()) / total if total else None


def _by_ending(paths: Sequence[str]) -> str:
    """Number of files and an example per ending, of the endings with most files."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        name = PurePath(path)
        ending = "hidden" if name.name.startswith(".") else f"*{name.suffix.lower()}"
        groups.setdefault(ending, []).append(path)
    by_size = sorted(groups.items(), key=lambda group: -len(group[1]))
    return format_examples([f"{len(files)} {end}, such as {files[0]}" for end, files in by_size])


def check_dataset(
    dataset: DatasetSpec,
    sample: int | None,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetReport:
    """List a dataset and open some or all of its pairs.

    When all are opened, the hashes of generated images are compared with their manifest, too.

    Args:
        dataset: its problems are reported; they raise nothing.
        sample: number of pairs to open, spread evenly over the list; None: all.
        workers: number of reading threads.
        progress: called after each pair with the number of pairs opened so far and in total.
    """
    listing = dataset.listing()
    report = DatasetReport(dataset, listing, unused=listing.unused)
    if not dataset.folders:  # a registered dataset names its files
        files = [f for r in listing.records for f in (r.image, r.label) if f is not None]
        report.unused = files_beside([str(f) for f in (*files, *listing.images_without_label)])
    chosen = spread(listing.records, sample)
    with ThreadPoolExecutor(workers) as pool:
        for defects, counts in pool.map(lambda r: _check_pair(r, listing, sample is None), chosen):
            report.num_opened += 1
            for defect, line in defects:
                report.defects[defect].append(line)
            if counts is not None:
                report.labels.add(counts)
            progress(report.num_opened, len(chosen))
    return report


def _check_pair(
    record: Record, listing: Listing, compare_hash: bool
) -> tuple[list[tuple[str, str]], LabelCounts | None]:
    """Defects of a pair, and counts of its label; optionally compare the hash of the image."""
    defects = []
    size: tuple[int, ...] | None = None
    try:
        image = read_image(record.image, strict=True)
    except DamagedImageError as error:
        defects.append((DAMAGED, str(error)))
    except (OSError, ValueError) as error:
        defects.append((UNREADABLE, str(error)))
    else:
        size = image.shape[:2]
        mismatch = _manifest_mismatch(listing, record, size, compare_hash)
        if mismatch:
            defects.append((NOT_AS_IN_MANIFEST, f"{record.image} ({mismatch})"))
        if record.domain is Domain.GENERATED and is_one_color(image):
            color = tuple(image[0, 0].tolist())
            defects.append((ONE_COLOR, f"{record.image} ({color} in RGB)"))
    if record.label is None or record.label_format is None:
        return defects, None
    try:
        raw = read_label(record.label, record.label_format)
    except (OSError, ValueError) as error:
        return [*defects, (UNREADABLE, str(error))], None
    if size is not None and size != raw.shape:
        sizes = f"{raw.shape[1]}x{raw.shape[0]}, image {size[1]}x{size[0]}"
        defects.append((OTHER_SIZE, f"{record.label} ({sizes})"))
    unknown = record.label_format.ids.unknown_ids(raw)
    if unknown:
        defects.append((UNKNOWN_IDS, f"{record.label} (ids {format_examples(unknown)})"))
    return defects, LabelCounts.of(record, raw)


def _manifest_mismatch(
    listing: Listing, record: Record, size: tuple[int, ...], compare_hash: bool
) -> str:
    """How the image, of this height and width, differs from its manifest; empty if it agrees."""
    entry = listing.manifest and listing.manifest.entry(record.image, listing.images)
    if entry and size != (entry.height, entry.width):
        return f"{size[1]}x{size[0]}, manifest {entry.width}x{entry.height}"
    if entry and compare_hash and file_sha256(record.image) != entry.sha256:
        return "other contents than when it was generated"
    return ""
