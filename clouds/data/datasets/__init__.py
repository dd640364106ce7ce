"""Datasets: their descriptions, lazy listing of their files, and access by name."""

from __future__ import annotations

from clouds.data.datasets.builtin import UnknownDatasetError, generated, is_generated
from clouds.data.datasets.catalog import (
    ROOT_VARIABLE,
    DatasetSpec,
    check_names_are_free,
    dataset_names,
    dataset_root,
    get_dataset,
    register_all,
)
from clouds.data.datasets.configured import Datasets, read_descriptions
from clouds.data.datasets.description_file import embed
from clouds.data.datasets.listing import Listing, forget_listings

__all__ = [
    "ROOT_VARIABLE",
    "DatasetSpec",
    "Datasets",
    "Listing",
    "UnknownDatasetError",
    "check_names_are_free",
    "dataset_names",
    "dataset_root",
    "embed",
    "forget_listings",
    "generated",
    "get_dataset",
    "is_generated",
    "read_descriptions",
    "register_all",
]
