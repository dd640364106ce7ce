"""Datasets described by YAML files, those of users and the builtin ones.

    name: campus                      # the datasets are campus_train and campus_val
    splits:
      train: {images: train/images, labels: train/labels}
      val: {images: val/images, labels: val/labels}
    classes:
      - {name: road, ids: [0, 17], words: [road, street]}
      - {name: tree, ids: [3]}
    ignore_ids: [255]

Paths are relative to `root`, which is relative to the folder of the file and by default that
folder. docs/own_data.md has all entries.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import cast

import yaml

from clouds.data.datasets.description import DatasetDescription, Folders
from clouds.data.label_space import (
    BUILTIN_LABEL_SPACES,
    IGNORE,
    LabelSpaceFile,
    builtin_label_space,
    read_classes,
)
from clouds.data.labels import Channel, LabelFormat, LabelMapping
from clouds.data.structures import Domain
from clouds.data.yaml_section import Color, DescriptionError, Section, parse, read_text
from clouds.files import expand_user

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TRAIN_IDS = "train_ids"
STORED_AS: tuple[Channel, ...] = ("index", "red", "color")
_TARGET_SPLIT = re.compile(r"(^|_)(val|valid|validation|test|testing|eval)$")
RawIds = Mapping[int, tuple[int, ...]]
"""Train id -> ids in label files."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def load_descriptions(entry: str) -> tuple[DatasetDescription, ...]:
    """The datasets of one entry of DATASETS.DESCRIPTIONS.

    Args:
        entry: path of a YAML file, relative to the working directory; or the text of such a file,
            of more than one line, as `embed` makes it.

    Raises:
        FileNotFoundError: no such file.
        DescriptionError: it is not a valid description.
    """
    if "\n" in entry:
        return parse_descriptions(entry, "a description in DATASETS.DESCRIPTIONS", Path())
    path = expand_user(entry)
    return parse_descriptions(read_text(path), str(path), path.absolute().parent)


def embed(entry: str) -> str:
    """An entry of DATASETS.DESCRIPTIONS as text that is independent of the file.

    Raises:
        FileNotFoundError, DescriptionError: as `load_descriptions`.
    """
    if "\n" in entry:
        return entry
    path = expand_user(entry)
    section = parse(read_text(path), str(path))
    content = {**section.content, "root": str(_root(section, path.absolute().parent))}
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000))


@lru_cache(maxsize=64)
def parse_descriptions(
    text: str, origin: str, folder: Path | None
) -> tuple[DatasetDescription, ...]:
    """The datasets that the text of a description describes, one per split.

    Args:
        text: YAML.
        origin: its file, for messages.
        folder: folder of the file; None: paths are relative to the dataset root.

    Raises:
        DescriptionError: it is not valid.
    """
    section = parse(text, origin)
    name = section.text("name", allowed="the name of the dataset")
    if not _NAME.fullmatch(name):
        raise section.error("name", "a name of letters, digits, '_', '-' and '.'")
    classes = _read_classes(section, name)
    formats = _label_formats(section, name, classes)
    if folder is None:  # builtin: the ids are those of the dataset
        formats = tuple(replace(format_, advice=LabelFormat.advice) for format_ in formats)
    policies = {
        entry: section.choice(entry, ("error", "skip"), "error")
        for entry in ("size_mismatch", "images_without_label")
    }
    description = DatasetDescription(
        name=name,
        domain=Domain.SOURCE,
        folders=(),
        image_suffixes=section.texts("image_suffixes", IMAGE_SUFFIXES),
        label_formats=formats,
        how_to_get=section.text("how_to_get", f"correct {origin}"),
        label_space=classes.label_space,
        classes=_classes_present(section, classes),
        size_mismatch="skip" if policies["size_mismatch"] == "skip" else "error",
        images_without_label="skip" if policies["images_without_label"] == "skip" else "error",
        report_mean_over_classes=section.flag("report_mean_over_classes"),
        image_prefix=section.text("image_prefix") if "image_prefix" in section else "",
        label_prefix=section.text("label_prefix") if "label_prefix" in section else "",
        described_root=None if folder is None else _root(section, folder),
    )
    splits = _splits(section, name)
    section.done()
    return tuple(
        replace(description, name=split, domain=domain, folders=folders)
        for split, (domain, folders) in splits.items()
    )


def _root(section: Section, folder: Path) -> Path:
    return Path(folder, expand_user(section.text("root", ".")))


def _splits(section: Section, name: str) -> dict[str, tuple[Domain, tuple[Folders, ...]]]:
    """Role and folders by the name of the dataset."""
    if "splits" not in section:
        return {name: (_domain(section, ""), (_folders(section),))}
    splits = section.section("splits")
    found = {}
    for split in splits.names():
        if isinstance(splits.content[split], list):
            alternatives = splits.sections(split)
        else:
            alternatives = [splits.section(split)]
        domain = _domain(alternatives[0], split)
        found[f"{name}_{split}"] = domain, tuple(_folders(entry) for entry in alternatives)
        for entry in alternatives:
            entry.done()
    if not found:
        raise section.error("splits", "at least one split, such as train: {images: …, labels: …}")
    return found


def _folders(section: Section) -> Folders:
    return Folders(
        section.text("images", allowed="the folder of the images"),
        section.text("labels", allowed="the folder of the labels"),
    )


def _domain(section: Section, split: str) -> Domain:
    by_name = "target" if _TARGET_SPLIT.search(split.lower()) else "source"
    return Domain(section.choice("domain", ("source", "target"), by_name))


def _read_classes(section: Section, name: str) -> LabelSpaceFile:
    """The classes of the description, or those of the label space that it names."""
    if "label_space" not in section:
        return read_classes(section, name)
    if "classes" in section:
        raise section.error("label_space", "nothing, since the file has its own 'classes'")
    known = section.choice("label_space", BUILTIN_LABEL_SPACES, "")
    return builtin_label_space(known)


def _classes_present(section: Section, classes: LabelSpaceFile) -> tuple[int, ...]:
    if "classes_present" not in section:
        return ()
    names = section.texts("classes_present", ())
    return tuple(sorted(_train_id(section, "classes_present", n, classes) for n in names))


def _train_id(section: Section, entry: str, name: str, classes: LabelSpaceFile) -> int:
    names = classes.label_space.names
    if name not in names:
        raise section.error(entry, f"names of classes: {', '.join(names)}; {name!r} is none")
    return names.index(name)


def _label_formats(section: Section, name: str, classes: LabelSpaceFile) -> tuple[LabelFormat, ...]:
    """The formats in 'label_formats'; without it, the one that the description itself tells."""
    if "label_formats" not in section:
        return (_label_format(section, "label_suffix", name, classes),)
    formats = section.sections("label_formats")
    found = tuple(_label_format(entry, "suffix", name, classes) for entry in formats)
    for entry in formats:
        entry.done()
    return found


def _label_format(section: Section, suffix: str, name: str, classes: LabelSpaceFile) -> LabelFormat:
    channel = cast("Channel", section.choice("stored_as", STORED_AS, STORED_AS[0]))
    if channel == "color":
        raw_ids, ignored, colors = _ids_of_label_colors(section, classes)
    else:
        raw_ids = _raw_ids(section, classes)
        ignored = _ignore_ids(section, classes, raw_ids)
        colors = _palette(section, classes, {*chain(*raw_ids.values()), *ignored})
    _check_one_class_each(section, raw_ids, classes)
    known = [*chain(*raw_ids.values()), *ignored]
    return LabelFormat(
        section.text(suffix, ".png"),
        LabelMapping(f"label ids of {name} ({_ranges(known)})", raw_ids, ignored),
        channel,
        advice=f"Add them to the ids of a class or to ignore_ids: {section.origin}.",
        colors=colors,
    )


def _check_one_class_each(section: Section, raw_ids: RawIds, classes: LabelSpaceFile) -> None:
    owners: dict[int, int] = {}
    for train_id, raws in raw_ids.items():
        for raw in raws:
            if owners.setdefault(raw, train_id) != train_id:
                both = [classes.label_space.names[c] for c in (owners[raw], train_id)]
                raise DescriptionError(
                    f"{section.origin}: the id {raw} belongs to {both[0]} and to {both[1]}; an id "
                    "belongs to one class"
                )


def _ids_of_label_colors(
    section: Section, classes: LabelSpaceFile
) -> tuple[RawIds, tuple[int, ...], tuple[tuple[int, Color], ...]]:
    """Ids by train id, ids to ignore, and the color of each id, for label files of colors.

    Each color is an id of its own, numbered in the order of the classes.
    """
    names = classes.label_space.names
    missing = [n for n, colors in zip(names, classes.label_colors, strict=True) if not colors]
    if missing:
        raise DescriptionError(
            f"{section.origin}: no 'color' of {', '.join(missing)}. With 'stored_as: color' each "
            "class needs the color that it has in the label files, or several as 'label_colors'"
        )
    owners: dict[Color, str] = {}
    groups = [*zip(names, classes.label_colors, strict=True), ("ignored", classes.ignore_colors)]
    for name, color in ((name, color) for name, colors in groups for color in colors):
        if owners.setdefault(color, name) != name:
            raise DescriptionError(
                f"{section.origin}: {list(color)} is the color of {owners[color]} and of {name}; a "
                "color belongs to one class"
            )
    numbers = {color: number for number, color in enumerate(owners)}
    raw_ids = {
        train_id: tuple(numbers[color] for color in colors)
        for train_id, colors in enumerate(classes.label_colors)
    }
    ignored = tuple(numbers[color] for color in classes.ignore_colors)
    return raw_ids, ignored, tuple((number, color) for color, number in numbers.items())


def _palette(
    section: Section, classes: LabelSpaceFile, known: Collection[int]
) -> tuple[tuple[int, Color], ...]:
    """The published colors of the ids `known`, for palette files; empty: none are published."""
    palette = () if "ids" in section else classes.palette
    if "palette" in section:
        palette = builtin_label_space(section.choice("palette", BUILTIN_LABEL_SPACES, "")).palette
    return tuple((raw_id, color) for raw_id, color in palette if raw_id in known)


def _raw_ids(section: Section, classes: LabelSpaceFile) -> RawIds:
    """The ids of each class, by train id: of the format, else those of the classes."""
    names = classes.label_space.names
    if "ids" not in section:
        missing = [name for name, ids in zip(names, classes.ids, strict=True) if not ids]
        if missing:
            raise DescriptionError(
                f"{section.origin}: no 'ids' of {', '.join(missing)}. Give each class its ids in "
                f"the label files, or write 'ids: {TRAIN_IDS}' if they are 0, 1, … in the order of "
                "the classes"
            )
        return dict(enumerate(classes.ids))
    if section.content["ids"] == TRAIN_IDS:
        return {i: (i,) for i in range(len(names))}
    table = section.section("ids")
    return {_train_id(section, "ids", name, classes): table.ids(name) for name in table.names()}


def _ignore_ids(section: Section, classes: LabelSpaceFile, raw_ids: RawIds) -> tuple[int, ...]:
    """The ids that do not count, without those of a class."""
    ids = classes.ignore_ids
    if "ignore_ids" in section or section.content.get("ids") == TRAIN_IDS:
        ids = section.ids("ignore_ids", [IGNORE])
    mapped = set(chain(*raw_ids.values()))
    return tuple(i for i in ids if i not in mapped)


def _ranges(ids: Iterable[int]) -> str:
    """Ids as text: 0-34, 255."""
    text = []
    for _, group in groupby(enumerate(sorted(set(ids))), lambda pair: pair[1] - pair[0]):
        run = [i for _, i in group]
        text.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(text)
