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
    known_label_space,
    register_all,
    training_label_space,
)
from clouds.data.datasets.listing import Listing, forget_listings

__all__ = [
    "ROOT_VARIABLE",
    "DatasetSpec",
    "Listing",
    "UnknownDatasetError",
    "check_names_are_free",
    "dataset_names",
    "dataset_root",
    "forget_listings",
    "generated",
    "get_dataset",
    "is_generated",
    "known_label_space",
    "register_all",
    "training_label_space",
]
