"""The datasets that CLOUDS knows: builtin ones, corrupted ones, and folders of generated images.

The builtin ones are the YAML files of `clouds/data/descriptions`, of the same form as a user's. To
add one, add a file there; nothing else has to change. Their folders are relative to the dataset
root. An image and a label form a pair when their paths, relative to the folders of images and
labels and without the suffixes and prefixes given there, are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import yaml

from clouds.data.corruption import CORRUPTIONS, SEVERITIES, Corruption
from clouds.data.datasets.description import DatasetDescription, Folders
from clouds.data.datasets.description_file import parse_descriptions
from clouds.data.datasets.manifest import MANIFEST_NAME
from clouds.data.label_space import CITYSCAPES_19, IGNORE, LabelSpace, read_classes
from clouds.data.labels import LabelFormat, LabelMapping
from clouds.data.structures import Domain
from clouds.data.yaml_section import parse, read_text

_ORDER = ("gta5", "synthia", "urbansyn", "cityscapes", "acdc", "bdd", "mapillary", "camvid")
"""The descriptions that lists of datasets begin with; the others follow by name."""


@cache
def builtin_datasets() -> dict[str, DatasetDescription]:
    """The builtin datasets by name."""
    files = {path.stem: path for path in _DESCRIPTIONS.glob("*.yaml")}
    stems = sorted(files, key=lambda stem: (_ORDER.index(stem) if stem in _ORDER else 99, stem))
    return {
        description.name: description
        for stem in stems
        for description in parse_descriptions(
            files[stem].read_text(encoding="utf-8"), str(files[stem]), None
        )
    }


_DESCRIPTIONS = Path(__file__).resolve().parents[1] / "descriptions"

GENERATED_PREFIX = "sd_"
GENERATED_ROOT = "stable_diffusion"
CLASSES_NAME = "classes.yaml"
"""File in the folder of a generated dataset: the classes of its labels. Without it, they are those
of Cityscapes-19."""

CORRUPTED_PREFIX = "cityscapes_c_"
CORRUPTED = "cityscapes_val"
"""The dataset whose images those of names with CORRUPTED_PREFIX are, corrupted."""


def generated_description(folder: str) -> DatasetDescription:
    """Description of the generated dataset `sd_<folder>`.

    Its labels, if it has any, are train ids of Cityscapes-19; see `with_own_classes`.
    """
    top = f"{GENERATED_ROOT}/{folder}"
    train_ids = {i: (i,) for i in range(CITYSCAPES_19.num_classes)}
    ids = LabelMapping("Cityscapes train ids (0-18, 255)", train_ids, (IGNORE,))
    return DatasetDescription(
        name=GENERATED_PREFIX + folder,
        domain=Domain.GENERATED,
        folders=(Folders(f"{top}/images", f"{top}/labels"),),
        image_suffixes=(".png", ".jpg", ".jpeg", ".webp"),
        label_formats=tuple(LabelFormat(end, ids) for end in ("_labelTrainIds.png", ".png")),
        labels_required=False,
        manifest=f"{top}/{MANIFEST_NAME}",
        how_to_get=f"generate it with `clouds generate` into {top}",
    )


def with_own_classes(description: DatasetDescription, path: Path) -> DatasetDescription:
    """A generated dataset whose labels are those of the file CLASSES_NAME, if there is one.

    Args:
        description: by `generated_description`.
        path: the file, a label space with the ids of the classes that are labelled.

    Raises:
        DescriptionError: the file is not valid.
    """
    if not path.is_file():
        return description
    section = parse(read_text(path), str(path))
    file = read_classes(section, section.text("name", description.name))
    section.done()
    train_ids = {i: ids for i, ids in enumerate(file.ids) if ids}
    ids = LabelMapping(f"train ids of {description.name}", train_ids, file.ignore_ids)
    return replace(
        description,
        label_space=file.label_space,
        label_formats=tuple(replace(f, ids=ids) for f in description.label_formats),
    )


def classes_text(label_space: LabelSpace, labelled: Sequence[int]) -> str:
    """Content of the file CLASSES_NAME: `labelled` are the train ids that its labels have."""
    rows = zip(label_space.names, label_space.colors, label_space.synonyms, strict=True)
    classes = [
        {
            "name": name,
            "ids": [i] if i in labelled else [],
            "color": list(color),
            "words": list(words),
        }
        for i, (name, color, words) in enumerate(rows)
    ]
    content = {"name": label_space.name, "classes": classes, "ignore_ids": [IGNORE]}
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000))


def corrupted_description(name: str) -> DatasetDescription:
    """Description of `cityscapes_c_<corruption>_<severity>`, such as cityscapes_c_fog_3.

    Raises:
        UnknownDatasetError: there is no such corruption or severity; the message lists them.
    """
    corruption, _, severity = name.removeprefix(CORRUPTED_PREFIX).rpartition("_")
    if corruption not in CORRUPTIONS or severity not in map(str, SEVERITIES):
        raise UnknownDatasetError(
            f"unknown dataset {name!r}. Names with {CORRUPTED_PREFIX} are "
            f"{CORRUPTED_PREFIX}<corruption>_<severity>, corruption one of "
            f"{', '.join(CORRUPTIONS)}, severity {SEVERITIES[0]} to {SEVERITIES[-1]}"
        )
    return replace(
        builtin_datasets()[CORRUPTED], name=name, corruption=Corruption(corruption, int(severity))
    )


def is_own(name: str) -> bool:
    """Whether the name is one of those of CLOUDS, so that no other dataset can have it."""
    reserved = name.startswith(CORRUPTED_PREFIX) or is_generated(name)
    return reserved or name in builtin_datasets()


def is_generated(name: str) -> bool:
    """Whether a dataset of this name is one of generated images; it need not exist."""
    return name not in builtin_datasets() and name.removeprefix(GENERATED_PREFIX) not in ("", name)


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
    if name in builtin_datasets():
        return builtin_datasets()[name]
    if name.startswith(CORRUPTED_PREFIX):
        return corrupted_description(name)
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
        f"unknown dataset {name!r}. Known: {', '.join(builtin_datasets())}, "
        f"{CORRUPTED_PREFIX}<corruption>_<severity>, such as {CORRUPTED_PREFIX}fog_3, and "
        f"{GENERATED_PREFIX}<folder> for generated images in {GENERATED_ROOT}/<folder>/images. "
        "Describe your own in a YAML file that DATASETS.DESCRIPTIONS names (docs/own_data.md), or "
        "register it, in every process, before the config is loaded: "
        f"clouds.d2.DatasetCatalog.register({name!r}, …)"
    )
