"""The datasets: one table of rows, listed lazily, with labels turned to train ids on reading."""

from __future__ import annotations

from clouds.data.datasets.catalog import register_all, training_label_space
from clouds.data.datasets.listing import Listing, forget_listings
from clouds.data.datasets.spec import (
    ROOT_VARIABLE,
    DatasetSpec,
    dataset_names,
    dataset_root,
    get_dataset,
)
from clouds.data.datasets.table import generated, is_generated

__all__ = [
    "ROOT_VARIABLE",
    "DatasetSpec",
    "Listing",
    "dataset_names",
    "dataset_root",
    "forget_listings",
    "generated",
    "get_dataset",
    "is_generated",
    "register_all",
    "training_label_space",
]
