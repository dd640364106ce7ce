"""Datasets that a user has registered in Detectron2's catalogs, in its semantic form.

    DatasetCatalog.register("mine_train", lambda: [{"file_name": …, "sem_seg_file_name": …}, …])
    MetadataCatalog.get("mine_train").set(stuff_classes=["road", "water"], ignore_label=255)

The ids in the label files are train ids: indices of `stuff_classes`, and `ignore_label`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np

from clouds.data.datasets.description import DatasetDescription
from clouds.data.datasets.listing import SAME_IMAGES, Listing
from clouds.data.datasets.scan import same_files
from clouds.data.label_space import IGNORE, LabelSpace, distinct_colors, words_of
from clouds.data.labels import LabelFormat, LabelMapping
from clouds.data.structures import Domain, Record
from clouds.messages import format_examples

logger = logging.getLogger(__name__)

MAX_CLASSES = 255  # label maps are uint8, and one value is `IGNORE`


def describe(name: str, metadata: Mapping[str, Any]) -> DatasetDescription:
    """Description of a registered dataset; it may be used for training and for evaluation.

    Args:
        name: its name in the catalogs.
        metadata: of it: `stuff_classes`; optional `stuff_colors` (RGB, 0-255), `ignore_label`
            (default 255).

    Raises:
        ValueError: a value is missing or not allowed; the message says what to set.
    """
    given = metadata.get("stuff_classes")
    given = () if given is None else given
    if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray):
        raise ValueError(
            f"dataset {name!r}: its stuff_classes are {given!r}, but must be a list of names"
        )
    classes = [str(class_name) for class_name in given]
    setting = f"MetadataCatalog.get({name!r}).set"
    if not classes:
        raise ValueError(
            f"dataset {name!r} is registered, but its metadata has no stuff_classes. Set them, in "
            f"the order of the ids in the label files: {setting}(stuff_classes=['road', 'car'])"
        )
    if len(classes) > MAX_CLASSES or len(set(classes)) < len(classes):
        raise ValueError(
            f"dataset {name!r}: its stuff_classes are {len(classes)} names, {len(set(classes))} of "
            f"them different. Allowed are up to {MAX_CLASSES} different names"
        )
    ignore = metadata.get("ignore_label")
    ignore = IGNORE if ignore is None else ignore
    if not isinstance(ignore, (int, np.integer)) or not len(classes) <= ignore <= IGNORE:
        raise ValueError(
            f"dataset {name!r}: its ignore_label is {ignore!r}. Allowed are whole numbers from "
            f"{len(classes)}, the number of its stuff_classes, to {IGNORE}; change it, and the "
            f"ids of such pixels in the label files: {setting}(ignore_label={IGNORE})"
        )
    ids = LabelMapping(
        f"ids of its {len(classes)} stuff_classes (0-{len(classes) - 1}) and its ignore_label "
        f"({ignore})",
        {i: (i,) for i in range(len(classes))},
        (int(ignore),),
    )
    return DatasetDescription(
        name=name,
        domain=Domain.SOURCE,
        folders=(),
        image_suffixes=(),
        label_formats=(LabelFormat("", ids, advice="Correct the file, or stuff_classes."),),
        how_to_get=f"correct what DatasetCatalog.get({name!r}) returns",
        label_space=LabelSpace(
            name=f"{len(classes)} classes of {name}",
            names=tuple(classes),
            colors=_colors(name, metadata.get("stuff_colors"), len(classes)),
            synonyms=words_of(classes),
        ),
    )


def _colors(name: str, colors: Any, count: int) -> tuple[tuple[int, int, int], ...]:
    """The colors of the metadata, or `count` distinct ones if there are none."""
    if colors is None or (isinstance(colors, Sized) and len(colors) == 0):
        return tuple(distinct_colors(count))
    try:
        as_tuples = tuple(tuple(int(value) for value in color) for color in colors)
    except (TypeError, ValueError, OverflowError):
        as_tuples = ()  # as a wrong number of colors
    if len(as_tuples) != count or any(
        len(color) != 3 or not all(0 <= value <= 255 for value in color) for color in as_tuples
    ):
        shown = format_examples(as_tuples) or repr(colors)
        raise ValueError(
            f"dataset {name!r}: its stuff_colors are {shown}. Set one RGB color of "
            f"whole numbers from 0 to 255 per class, {count} in all, or none"
        )
    return tuple((r, g, b) for r, g, b in as_tuples)


def list_samples(name: str, samples: Iterable[Any], label_format: LabelFormat) -> Listing:
    """The files of a registered dataset, in the order of its samples.

    Args:
        name: its name.
        samples: dictionaries with `file_name` and `sem_seg_file_name`; other entries are not used.
        label_format: of all label files.

    Raises:
        ValueError: a sample has no `file_name`, or an image occurs more than once.
    """
    if not isinstance(samples, Iterable):
        raise ValueError(
            f"dataset {name!r}: DatasetCatalog.get({name!r}) returns {samples!r}, but must return "
            "a list of dictionaries with 'file_name' and 'sem_seg_file_name'"
        )
    records: list[Record] = []
    unlabeled: list[Path] = []
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or not sample.get("file_name"):
            raise ValueError(
                f"dataset {name!r}: sample {number} has no 'file_name'. Each must be a dictionary "
                "with 'file_name', the image, and 'sem_seg_file_name', the label"
            )
        label = sample.get("sem_seg_file_name")
        for file in (sample["file_name"], label or ""):
            if not isinstance(file, str | Path):
                raise ValueError(
                    f"dataset {name!r}: sample {number} names the file {file!r}. Each must be a "
                    "path: text or a pathlib.Path"
                )
        image = Path(sample["file_name"])
        if label:
            records.append(Record(image, Path(label), Domain.SOURCE, name, label_format))
        else:
            unlabeled.append(image)
    images = [*unlabeled, *(record.image for record in records)]
    repeated = [image for image, count in Counter(images).items() if count > 1]
    if repeated:
        raise ValueError(
            f"dataset {name!r}: {len(repeated)} images occur more than once: "
            f"{format_examples(repeated)}. Correct what DatasetCatalog.get({name!r}) returns"
        )
    labels = [record.label for record in records if record.label is not None]
    same_images = same_files(_identities(images))
    if same_images:
        logger.warning("%s: " + SAME_IMAGES, name, len(same_images), format_examples(same_images))
    return Listing(
        images=Path(),
        labels=Path(),
        has_images=True,
        has_labels=True,
        records=tuple(records),
        images_without_label=tuple(unlabeled),
        labels_without_image=(),
        skipped=(),
        missing=tuple(file for file in (*images, *labels) if not file.is_file()),
        same_images=same_images,
        same_labels=same_files(_identities(labels)),
    )


def _identities(files: Sequence[Path]) -> list[tuple[str, tuple[int, int]]]:
    """Path, and device and inode, of the files that exist; each path once."""
    identities = []
    for file in dict.fromkeys(files):
        if file.is_file():
            status = file.stat()
            identities.append((str(file), (status.st_dev, status.st_ino)))
    return identities
