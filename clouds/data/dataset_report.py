"""Check of the files of a dataset, for `clouds check-data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from clouds.data.datasets import DatasetSpec, Listing
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
    """

    dataset: DatasetSpec
    listing: Listing
    num_opened: int = 0
    defects: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in DEFECTS})

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
        return missing + gaps + defects


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
    report = DatasetReport(dataset, listing)
    chosen = _spread(listing.records, sample)
    with ThreadPoolExecutor(workers) as pool:
        for defects in pool.map(lambda r: _check_pair(r, listing, sample is None), chosen):
            report.num_opened += 1
            for defect, line in defects:
                report.defects[defect].append(line)
            progress(report.num_opened, len(chosen))
    return report


def _spread(records: Sequence[Record], count: int | None) -> Sequence[Record]:
    """`count` of them, from the first to the last in even steps."""
    if count is None or count >= len(records):
        return records
    return [records[i * (len(records) - 1) // max(1, count - 1)] for i in range(count)]


def _check_pair(record: Record, listing: Listing, compare_hash: bool) -> list[tuple[str, str]]:
    """Read one pair; optionally compare the hash of the image with the manifest."""
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
        return defects
    try:
        raw = read_label(record.label, record.label_format)
    except (OSError, ValueError) as error:
        return [*defects, (UNREADABLE, str(error))]
    if size is not None and size != raw.shape:
        sizes = f"{raw.shape[1]}x{raw.shape[0]}, image {size[1]}x{size[0]}"
        defects.append((OTHER_SIZE, f"{record.label} ({sizes})"))
    unknown = record.label_format.ids.unknown_ids(raw)
    if unknown:
        defects.append((UNKNOWN_IDS, f"{record.label} (ids {format_examples(unknown)})"))
    return defects


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
