"""Datasets by name: their records, and their registration in Detectron2's catalogs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from clouds.data.corruption import import_package
from clouds.data.datasets.builtin import (
    CLASSES_NAME,
    CORRUPTED_PREFIX,
    GENERATED_PREFIX,
    GENERATED_ROOT,
    UnknownDatasetError,
    builtin_datasets,
    get_description,
    is_own,
    with_own_classes,
)
from clouds.data.datasets.description import DatasetDescription
from clouds.data.datasets.listing import Listing, list_dataset, list_registered
from clouds.data.datasets.registered import describe, list_samples
from clouds.data.datasets.scan import is_foreign_folder
from clouds.data.labels import read_train_ids
from clouds.data.structures import Domain, Record
from clouds.files import expand_user
from clouds.messages import format_examples

ROOT_VARIABLE = "DETECTRON2_DATASETS"


def dataset_root() -> Path:
    """The folder that contains all datasets: $DETECTRON2_DATASETS, or `datasets`."""
    return expand_user(os.environ.get(ROOT_VARIABLE, "datasets"))


@dataclass(frozen=True)
class DatasetSpec(DatasetDescription):
    """A dataset under one root; no file is accessed before a method needs it."""

    root: Path = Path()

    def listing(self) -> Listing:
        """The files on disk, also of an incomplete dataset; missing files raise nothing."""
        listing = list_dataset(self, self.root)
        corruption = self.corruption
        if corruption is None:
            return listing
        files = [record.image.relative_to(listing.images).as_posix() for record in listing.records]
        records = zip(listing.records, files, strict=True)
        return replace(
            listing,
            records=tuple(replace(r, corruption=corruption.of_file(file)) for r, file in records),
        )

    def records(self) -> list[Record]:
        """Its images with their labels, sorted by path.

        Raises:
            FileNotFoundError: the root, or the folder of images or labels, does not exist.
            ValueError: there is no image, or one of a pair is missing.
            ImportError: the package that corrupts its images is missing.
        """
        if self.corruption is not None:
            import_package()
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"the dataset root {self.root.absolute()} does not exist. Set the environment "
                f"variable {ROOT_VARIABLE} to the folder that contains gta5/, cityscapes/ and the "
                "other datasets; `clouds make-demo-data` renders demo datasets."
            )
        listing = self.listing()
        missing = self.missing_folders(listing)
        if missing:
            raise FileNotFoundError(
                f"dataset {self.name}: no folder {' and no folder '.join(missing)}. {self.hint()}"
            )
        return self.complete_records(listing)

    def complete_records(self, listing: Listing) -> list[Record]:
        """The images of a listing; ValueError if `gaps` are in it."""
        problems = [f"dataset {self.name}: {gap}" for gap in self.gaps(listing)]
        if problems:
            raise ValueError("\n".join([*problems, self.hint()]))
        return list(listing.records)

    def missing_folders(self, listing: Listing) -> list[str]:
        """The required folders that do not exist."""
        missing = [] if listing.has_images else [str(listing.images)]
        if self.labels_required and not listing.has_labels:
            missing.append(str(listing.labels))
        return missing

    def gaps(self, listing: Listing) -> list[str]:
        """Missing files in the folders, and missing packages, a sentence per problem."""
        unlabelled = listing.images_without_label
        if self.images_without_label == "skip":
            unlabelled = ()
        gaps = [
            f"{len(files)} {what}: {format_examples(files)}."
            for files, what in (
                (unlabelled, "images have no label"),
                (listing.labels_without_image, "labels have no image"),
                (listing.missing, "files do not exist"),
            )
            if files and self.labels_required
        ]
        if listing.unusable:
            gaps.append(
                f"{len(listing.unusable)} paths cannot be used: "
                f"{format_examples(listing.unusable)}. Only regular files and readable folders are "
                "allowed, also through links: correct these, or remove them."
            )
        if not listing.records and not gaps:
            names = " or ".join(f"*{suffix}" for suffix in self.image_suffixes)
            others = f" Files that are not used: {format_examples(listing.unused)}."
            gaps.append(
                f"no usable image {names} in {listing.images}.{others * bool(listing.unused)}"
            )
        if self.corruption is not None:
            try:
                import_package()
            except ImportError as error:
                gaps.append(f"{error}.")
        return gaps

    def manifest_gaps(self, listing: Listing) -> list[str]:
        """Differences between the images in the folder and its manifest, a sentence each.

        Empty when there is no manifest: any images may be used in place of generated ones.
        """
        manifest = listing.manifest
        if manifest is None:
            return []
        again = "run the generator again with the same options: it generates the missing images"
        gaps = [manifest.error] if manifest.error else []
        if manifest.unlisted_images:
            gaps.append(
                f"{len(manifest.unlisted_images)} images have no entry in {manifest.path}: "
                f"{format_examples(manifest.unlisted_images)}. The generator was stopped before it "
                "wrote their entries, or is still running, or the images are from elsewhere. "
                f"Delete them, or {again}."
            )
        if manifest.missing_files:
            gaps.append(
                f"{len(manifest.missing_files)} images of {manifest.path} are missing in "
                f"{listing.images}: {format_examples(manifest.missing_files)}. To restore them, "
                f"{again}."
            )
        return gaps

    def hint(self) -> str:
        """The expected files, and where to get them."""
        images = " or ".join(f"*{suffix}" for suffix in self.image_suffixes)
        labels = " or ".join(f"*{format_.suffix}" for format_ in self.label_formats)
        layouts = " or ".join(
            f"{f.images}/**/{images}" + f", {f.labels}/**/{labels}" * self.labels_required
            for f in self.folders
        )
        hint = f"Expected under {self.root.absolute()}: {layouts}. To get it: {self.how_to_get}."
        names = dataset_names(self.root)[len(builtin_datasets()) :] if self.manifest else []
        others = [name for name in names if name != self.name]
        if others:
            hint += f" Available generated datasets: {format_examples(others)}."
        return hint

    def read_label(self, record: Record) -> npt.NDArray[np.uint8]:
        """Train ids (H, W) of a record; ValueError without a label; or as `read_train_ids`."""
        if record.label is None:
            raise ValueError(f"{record.image} has no label")
        assert record.label_format is not None  # checked by Record
        return read_train_ids(record.label, record.label_format, self.name)


@dataclass(frozen=True)
class RegisteredSpec(DatasetSpec):
    """A dataset that is registered in Detectron2's catalog; `root` is not used.

    The registered function is called once: as in Detectron2, it must always return the same.
    """

    def listing(self) -> Listing:
        """Its files; raises as `registered.list_samples`."""
        from clouds.d2 import DatasetCatalog

        function = DatasetCatalog[self.name]
        return list_registered(
            self,
            function,
            lambda: list_samples(self.name, function(), self.label_formats[0]),
        )

    def records(self) -> list[Record]:
        """Its images with their labels, in its order; errors as in `DatasetSpec`."""
        return self.complete_records(self.listing())

    def gaps(self, listing: Listing) -> list[str]:
        """Missing files, a sentence per problem."""
        if listing.records or listing.images_without_label:
            return super().gaps(listing)
        return [f"DatasetCatalog.get({self.name!r}) returns no sample."]

    def hint(self) -> str:
        """What to correct."""
        return (
            "Each sample must have 'file_name', the image, and 'sem_seg_file_name', the label: "
            f"{self.how_to_get}. Relative paths start at {Path.cwd()}."
        )


def get_dataset(
    name: str,
    root: Path | None = None,
    described: Mapping[str, DatasetDescription] = MappingProxyType({}),
) -> DatasetSpec:
    """The dataset `name` with the train ids of its own label space.

    Args:
        name: its name in a config: of a builtin dataset, `cityscapes_c_<corruption>_<severity>` of
            corrupted images, `sd_<folder>` of generated ones, of a described dataset, or of one
            that is registered in Detectron2's catalog.
        root: the dataset root; described and registered datasets are independent of it.
        described: descriptions by name, see `configured.read_descriptions`.

    Raises:
        UnknownDatasetError: no such dataset; the message lists the known ones. Or it is
            registered, and its metadata is not complete or not allowed.
        DescriptionError: the file CLASSES_NAME of a generated dataset is not valid.
    """
    if name in described:
        description = described[name]
        return DatasetSpec(**vars(description), root=description.described_root or Path())
    if not is_own(name):
        from clouds.d2 import DatasetCatalog, MetadataCatalog

        if name in DatasetCatalog:
            try:
                description = describe(name, MetadataCatalog.get(name).as_dict())
            except ValueError as error:
                raise UnknownDatasetError(str(error)) from error
            return RegisteredSpec(**vars(description))
    description = get_description(name)
    root = dataset_root() if root is None else root
    if description.domain is Domain.GENERATED:
        folder = root / GENERATED_ROOT / name.removeprefix(GENERATED_PREFIX)
        description = with_own_classes(description, folder / CLASSES_NAME)
    return DatasetSpec(**vars(description), root=root)


def check_names_are_free(names: Sequence[str]) -> None:
    """Check that no other data is registered under the name of a dataset of this project.

    Raises:
        ValueError: somebody has.
    """
    from clouds.d2 import DatasetCatalog

    for name in names:
        if is_own(name) and name in DatasetCatalog:
            function = DatasetCatalog[name]
            if getattr(function, "func", None) is not _samples:
                raise ValueError(
                    f"dataset {name!r} is registered in DatasetCatalog, but this is the name of a "
                    "dataset of CLOUDS, which would be used instead. Register it under another "
                    f"name; names with {GENERATED_PREFIX} are those of generated images, with "
                    f"{CORRUPTED_PREFIX} of corrupted ones"
                )


def dataset_names(root: Path | None = None) -> list[str]:
    """All builtin datasets, and the generated ones that exist under the root, no hidden folders."""
    top = (dataset_root() if root is None else root) / GENERATED_ROOT
    paths = top.iterdir() if top.is_dir() else ()
    folders = sorted(f.name for f in paths if f.is_dir() and not is_foreign_folder(f.name))
    return [*builtin_datasets(), *(GENERATED_PREFIX + folder for folder in folders)]


def register_all() -> None:
    """Register the builtin datasets in Detectron2's catalogs; calling it again has no effect.

    An entry is a list of dicts with `file_name`, `sem_seg_file_name` (in the ids of the dataset;
    `get_dataset(name).read_label` reads it as train ids), `domain` and `dataset`. The files are
    listed when an entry is requested.
    """
    from clouds.d2 import DatasetCatalog, MetadataCatalog  # imports torch, which takes seconds

    for name, description in builtin_datasets().items():
        if name in DatasetCatalog:
            continue
        label_space = description.label_space
        DatasetCatalog.register(name, partial(_samples, name))
        MetadataCatalog.get(name).set(
            stuff_classes=list(label_space.names),
            stuff_colors=[list(color) for color in label_space.colors],
            ignore_label=label_space.ignore,
            evaluator_type="sem_seg",
        )


def _samples(name: str) -> list[dict[str, Any]]:
    return [
        {
            "file_name": str(record.image),
            "domain": record.domain,
            "dataset": record.dataset,
            **({} if record.label is None else {"sem_seg_file_name": str(record.label)}),
        }
        for record in get_dataset(name).records()
    ]
