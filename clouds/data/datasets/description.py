"""Description of a dataset: its folders, file names, label formats and classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from clouds.data.corruption import Corruption
from clouds.data.label_space import CITYSCAPES_19, LabelSpace
from clouds.data.labels import LabelFormat, LabelMapping
from clouds.data.structures import Domain


@dataclass(frozen=True)
class Folders:
    """Folders of images and labels, relative to the root of the dataset."""

    images: str
    labels: str


@dataclass(frozen=True)
class DatasetDescription:
    """One dataset.

    Attributes:
        name: name in a config.
        domain: role of the dataset.
        folders: its folders; of several alternatives, the first that exists is used.
        image_suffixes: ends of the names of its image files.
        label_formats: formats of its label files. Where an image has labels in several formats,
            the first one is used; a file name that fits several suffixes has the first format.
        how_to_get: where it is available, for messages.
        label_space: the classes that its ids are mapped to.
        classes: train ids in its label set, which a mean over classes is taken of; empty: all
            that its last (original) label format has.
        size_mismatch: what to do with a pair whose image and label differ in size: 'error' when
            it is read, or 'skip' when the dataset is listed.
        labels_required: whether an image without label, or a label without image, is an error.
        images_without_label: 'skip': an image without label is left out when the dataset is listed.
        manifest: manifest of generated images, relative to the dataset root; empty: there is
            none.
        report_mean_over_classes: report an additional mean over `classes` in evaluations that train
            or test on it.
        image_prefix, label_prefix: beginnings of the names of image and label files that a pair
            does not share.
        described_root: root of its folders; None: the dataset root.
        unmapped_classes: names of its own classes that `label_space` does not have, see
            `in_label_space`; their pixels do not count.
        corruption: of its images when they are read, each with the seed of its file; None: none.
    """

    name: str
    domain: Domain
    folders: tuple[Folders, ...]
    image_suffixes: tuple[str, ...]
    label_formats: tuple[LabelFormat, ...]
    how_to_get: str
    label_space: LabelSpace = CITYSCAPES_19
    classes: tuple[int, ...] = ()
    size_mismatch: Literal["error", "skip"] = "error"
    labels_required: bool = True
    images_without_label: Literal["error", "skip"] = "error"
    manifest: str = ""
    report_mean_over_classes: bool = False
    image_prefix: str = ""
    label_prefix: str = ""
    described_root: Path | None = None
    unmapped_classes: tuple[str, ...] = ()
    corruption: Corruption | None = None

    @property
    def classes_present(self) -> tuple[int, ...]:
        """Train ids in its label set, ascending."""
        formats = self.label_formats
        return self.classes or (formats[-1].ids.classes if formats else ())


Description = TypeVar("Description", bound=DatasetDescription)


def in_label_space(
    description: Description, label_space: LabelSpace, class_map: Mapping[str, str]
) -> Description:
    """The same dataset with the train ids of another label space.

    A class becomes the one that `class_map` names, else the one of the same name (upper and lower
    case are the same). Pixels of classes without such a one do not count.

    Args:
        description: of the dataset.
        label_space: the other one.
        class_map: name of a class of the dataset -> name of a class of `label_space`, or "": none.

    Raises:
        ValueError: a class in `class_map` does not exist, or no class of the dataset is in
            `label_space` although it needs labels; without, it has no labels then.
    """
    own = description.label_space
    if own == label_space and not class_map:
        return description
    wanted = {name.lower(): i for i, name in enumerate(label_space.names)}
    _check_names(class_map, own, {"", *wanted}, label_space)
    changed = {name.lower(): target.lower() for name, target in class_map.items()}
    table: dict[int, int] = {}
    for train_id, name in enumerate(own.names):
        target = changed.get(name.lower(), name.lower())
        if target in wanted:
            table[train_id] = wanted[target]
    if not table and not description.labels_required:
        return replace(description, label_space=label_space, label_formats=(), classes=())
    if not table:
        raise ValueError(
            f"dataset {description.name}: none of its classes ({', '.join(own.names)}) is in the "
            f"label space {label_space.name} ({', '.join(label_space.names)}). Name those that are "
            f"the same: DATASETS.CLASS_MAP \"('{description.name}: {own.names[0]}="
            f"{label_space.names[0]}',)\""
        )
    return replace(
        description,
        label_space=label_space,
        label_formats=tuple(
            replace(format_, ids=_mapped(format_.ids, table))
            for format_ in description.label_formats
        ),
        classes=tuple(sorted({table[c] for c in description.classes_present if c in table})),
        unmapped_classes=tuple(own.names[c] for c in description.classes_present if c not in table),
    )


def _mapped(ids: LabelMapping, table: Mapping[int, int]) -> LabelMapping:
    raw_ids: dict[int, tuple[int, ...]] = {}
    ignored = ids.ignore_ids
    for train_id, raws in ids.raw_ids.items():
        if train_id in table:
            raw_ids[table[train_id]] = raw_ids.get(table[train_id], ()) + raws
        else:
            ignored += raws
    return replace(ids, raw_ids=raw_ids, ignore_ids=ignored)


def _check_names(
    class_map: Mapping[str, str], own: LabelSpace, allowed: set[str], label_space: LabelSpace
) -> None:
    own_names = {name.lower() for name in own.names}
    for name, target in class_map.items():
        if name.lower() not in own_names:
            raise ValueError(
                f"DATASETS.CLASS_MAP: {name!r} is no class of {own.name}; these are "
                f"{', '.join(own.names)}"
            )
        if target.lower() not in allowed:
            raise ValueError(
                f"DATASETS.CLASS_MAP: {target!r} is no class of {label_space.name}; these are "
                f"{', '.join(label_space.names)}; nothing after '=' means that the pixels do not "
                "count"
            )
