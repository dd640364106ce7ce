"""Is a dataset complete and sound? What `tools/check_datasets.py` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from clouds.data.datasets import DatasetSpec, Listing
from clouds.data.datasets.listing import some
from clouds.data.datasets.manifest import file_sha256
from clouds.data.reading import read_image
from clouds.data.structures import Record

State = Literal["ok", "broken", "missing"]


@dataclass
class Health:
    """What was found of one dataset.

    Attributes:
        dataset: the dataset.
        listing: its files.
        opened: pairs that were read.
        broken_files: what reading said about each file that cannot be read.
        size_mismatches: a line per pair, read, whose image and label differ in size.
        unknown_ids: a line per label, read, that holds ids which the dataset does not define.
        not_as_painted: a line per generated image, read, that is not what its manifest says.
    """

    dataset: DatasetSpec
    listing: Listing
    opened: int = 0
    broken_files: list[str] = field(default_factory=list)
    size_mismatches: list[str] = field(default_factory=list)
    unknown_ids: list[str] = field(default_factory=list)
    not_as_painted: list[str] = field(default_factory=list)

    @property
    def state(self) -> State:
        """'missing': nothing is there; 'broken': something is there that cannot be used."""
        if not self.listing.has_images and not self.listing.has_labels:
            return "missing"
        return "broken" if self.problems() else "ok"

    def problems(self) -> list[str]:
        """What is wrong, a sentence each; empty when nothing is."""
        missing = [f"no folder {path}" for path in self.dataset.missing_folders(self.listing)]
        gaps = []
        if not missing:
            gaps = self.dataset.gaps(self.listing) + self.dataset.manifest_gaps(self.listing)
        found = [
            f"{len(lines)} {what}: {some(lines, 3)}"
            for what, lines in (
                ("files cannot be read", self.broken_files),
                ("labels of another size than their image", self.size_mismatches),
                ("labels with unknown ids", self.unknown_ids),
                ("images are not as the manifest says", self.not_as_painted),
            )
            if lines
        ]
        return missing + gaps + found


def check_dataset(
    dataset: DatasetSpec,
    sample: int | None,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Health:
    """List a dataset and open some or all of its pairs.

    Where all are opened, the contents of generated images are held against their manifest too.

    Args:
        dataset: which.
        sample: how many pairs to open, spread evenly over the list; None: all.
        workers: how many threads read.
        progress: called after each pair with how many were opened and how many will be.

    Returns:
        What was found; nothing about the data raises.
    """
    listing = dataset.listing()
    health = Health(dataset, listing)
    chosen = _spread(listing.records, sample)
    with ThreadPoolExecutor(workers) as pool:
        for finding in pool.map(lambda r: _open(dataset, r, listing, sample is None), chosen):
            health.opened += 1
            health.broken_files += finding.broken
            health.size_mismatches += finding.mismatch
            health.unknown_ids += finding.unknown
            health.not_as_painted += finding.not_as_painted
            progress(health.opened, len(chosen))
    return health


def _spread(records: Sequence[Record], count: int | None) -> Sequence[Record]:
    """`count` of them, from the first to the last in even steps."""
    if count is None or count >= len(records):
        return records
    return [records[i * (len(records) - 1) // max(1, count - 1)] for i in range(count)]


@dataclass
class _Finding:
    """What reading one pair showed, each a list of no or few lines."""

    broken: list[str] = field(default_factory=list)
    mismatch: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    not_as_painted: list[str] = field(default_factory=list)


def _open(dataset: DatasetSpec, record: Record, listing: Listing, contents: bool) -> _Finding:
    """Read one pair; `contents`: and compare the image's hash with the manifest's."""
    finding = _Finding()
    shapes = []
    try:
        shapes.append(read_image(record.image).shape[:2])
    except (OSError, ValueError) as error:
        finding.broken.append(str(error))
    else:
        finding.not_as_painted += _differences(listing, record, shapes[0], contents)
    if record.label is None:
        return finding
    try:
        raw = dataset.read_raw(record.label)
    except (OSError, ValueError) as error:
        finding.broken.append(str(error))
        return finding
    shapes.append(raw.shape)
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        (h, w), (label_h, label_w) = shapes
        finding.mismatch.append(f"{record.label} ({label_w}x{label_h}, image {w}x{h})")
    unknown = dataset.unknown_ids(record.label, raw)
    if unknown:
        finding.unknown.append(f"{record.label} (ids {some(unknown)})")
    return finding


def _differences(
    listing: Listing, record: Record, size: tuple[int, ...], contents: bool
) -> list[str]:
    """How an image of this height and width differs from what its manifest says, if it does."""
    entry = listing.manifest and listing.manifest.entry(record.image, listing.images)
    if not entry:
        return []
    if size != (entry.height, entry.width):
        sizes = f"{size[1]}x{size[0]}, painted {entry.width}x{entry.height}"
        return [f"{record.image} ({sizes})"]
    if contents and file_sha256(record.image) != entry.sha256:
        return [f"{record.image} (other contents than were painted)"]
    return []
