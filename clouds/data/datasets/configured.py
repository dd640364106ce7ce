"""The datasets of a config, of all kinds, in the training label space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from clouds.data.datasets.builtin import (
    CORRUPTED_PREFIX,
    GENERATED_PREFIX,
    UnknownDatasetError,
    is_generated,
    is_own,
)
from clouds.data.datasets.catalog import DatasetSpec, get_dataset
from clouds.data.datasets.description import DatasetDescription, in_label_space
from clouds.data.datasets.description_file import load_descriptions
from clouds.data.label_space import BUILTIN_LABEL_SPACES, LabelSpace, builtin_label_space
from clouds.data.yaml_section import DescriptionError

if TYPE_CHECKING:
    from clouds.d2 import CfgNode


@dataclass(frozen=True)
class Datasets:
    """The datasets that a config may name.

    Attributes:
        train: DATASETS.TRAIN.
        label_space_name: DATASETS.LABEL_SPACE.
        class_map: DATASETS.CLASS_MAP, each entry '<pattern of names>: <class>=<training class>, …'.
        described: descriptions of DATASETS.DESCRIPTIONS, by name of the dataset.
    """

    train: tuple[str, ...]
    label_space_name: str = ""
    class_map: tuple[str, ...] = ()
    described: Mapping[str, DatasetDescription] = field(default_factory=dict)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Datasets:
        """From DATASETS; raises as `of`."""
        keys = cfg.DATASETS
        return cls.of(keys.TRAIN, keys.DESCRIPTIONS, keys.LABEL_SPACE, keys.CLASS_MAP)

    @classmethod
    def of(
        cls,
        train: Sequence[str],
        descriptions: Sequence[str] = (),
        label_space: str = "",
        class_map: Sequence[str] = (),
    ) -> Datasets:
        """From the values of TRAIN, DESCRIPTIONS, LABEL_SPACE and CLASS_MAP in DATASETS.

        Raises:
            FileNotFoundError, DescriptionError: a description does not exist or is not valid, or
                two describe the same name.
        """
        return cls(tuple(train), label_space, tuple(class_map), read_descriptions(descriptions))

    def own(self, name: str, root: Path | None = None) -> DatasetSpec:
        """A dataset with the train ids of its own label space; see `get_dataset`."""
        return get_dataset(name, root, self.described)

    def get(self, name: str) -> DatasetSpec:
        """A dataset with the train ids of the training label space, if that is known.

        Raises:
            UnknownDatasetError: see `get_dataset`.
            ValueError: its classes cannot be mapped, see `in_label_space`.
        """
        dataset = self.own(name)
        label_space = self.known_label_space
        if label_space is None:
            return dataset
        return in_label_space(dataset, label_space, self.class_map_of(name))

    @cached_property
    def label_space(self) -> LabelSpace:
        """The training label space: DATASETS.LABEL_SPACE, else that of all labelled datasets.

        Raises:
            ValueError: a dataset is unknown, none is labelled, or their label spaces differ.
        """
        if self.label_space_name:
            return self._named_label_space()
        spaces = {name: self.own(name).label_space for name in self.labelled}
        if not spaces:
            raise ValueError(f"no labelled dataset among {', '.join(self.train) or 'none'}")
        first, *others = spaces.values()
        if any(other != first for other in others):
            counts = ", ".join(
                f"{name} ({s.name}, {s.num_classes} classes)" for name, s in spaces.items()
            )
            raise ValueError(
                f"datasets with different label spaces: {counts}. Set DATASETS.LABEL_SPACE to the "
                "one to train on; classes are mapped to it by name, and as DATASETS.CLASS_MAP says"
            )
        return first

    @cached_property
    def known_label_space(self) -> LabelSpace | None:
        """`label_space`, or None if no labelled dataset is named, or an unknown one."""
        if not self.labelled and not self.label_space_name:
            return None
        try:
            return self.label_space
        except UnknownDatasetError:
            return None

    @property
    def labelled(self) -> tuple[str, ...]:
        """The names in DATASETS.TRAIN that are not of generated images."""
        return tuple(name for name in self.train if not is_generated(name))

    def class_map_of(self, name: str) -> dict[str, str]:
        """Classes of a dataset -> classes of the training label space, by DATASETS.CLASS_MAP.

        Raises:
            ValueError: an entry has another form.
        """
        found: dict[str, str] = {}
        for entry in self.class_map:
            pattern, _, pairs = entry.partition(":")
            table = [pair.split("=") for pair in pairs.split(",")]
            if not pattern.strip() or not all(len(p) == 2 and p[0].strip() for p in table):
                raise ValueError(
                    f"DATASETS.CLASS_MAP has {entry!r}; allowed is '<dataset, also with *>: "
                    "<its class>=<training class>, …', such as 'camvid11_*: tree=vegetation'"
                )
            if fnmatchcase(name, pattern.strip()):
                found |= {own.strip(): target.strip() for own, target in table}
        return found

    def _named_label_space(self) -> LabelSpace:
        name = self.label_space_name
        if name in BUILTIN_LABEL_SPACES:
            return builtin_label_space(name).label_space
        known = {d.label_space.name: d.label_space for d in self.described.values()}
        if name not in known:
            raise ValueError(
                f"DATASETS.LABEL_SPACE is {name!r}; allowed are "
                f"{', '.join([*BUILTIN_LABEL_SPACES, *known])} (the names of the descriptions in "
                "DATASETS.DESCRIPTIONS), or nothing, for that of DATASETS.TRAIN"
            )
        return known[name]


def read_descriptions(entries: Sequence[str]) -> dict[str, DatasetDescription]:
    """The datasets of DATASETS.DESCRIPTIONS by name; raises as `Datasets.of`."""
    found: dict[str, DatasetDescription] = {}
    for entry in entries:
        for description in load_descriptions(entry):
            name = description.name
            if is_own(name) or name.startswith(GENERATED_PREFIX):
                raise DescriptionError(
                    f"DATASETS.DESCRIPTIONS describes {name!r}, which is the name of a dataset of "
                    f"CLOUDS; names with {GENERATED_PREFIX} are those of generated images, with "
                    f"{CORRUPTED_PREFIX} of corrupted ones. Choose another name"
                )
            if name in found:
                raise DescriptionError(
                    f"DATASETS.DESCRIPTIONS describes {name!r} more than once; each description "
                    "needs a name of its own"
                )
            found[name] = description
    return found
