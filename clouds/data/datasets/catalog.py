"""The table's datasets in the catalogs that Detectron2's tools look into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from clouds.data.datasets.spec import get_dataset
from clouds.data.datasets.table import ROWS, get_row, is_generated
from clouds.data.label_space import CITYSCAPES_19, IGNORE, LabelSpace


def register_all() -> None:
    """Register every row of the table; again is harmless. No file is looked at before it is asked.

    An entry is a list of dicts with `file_name`, `sem_seg_file_name` (the dataset's own ids; read
    it with `get_dataset(name).read_label`), `domain` and `dataset`.
    """
    from clouds.d2 import DatasetCatalog, MetadataCatalog  # takes torch's seconds to import

    for name in ROWS:
        if name in DatasetCatalog:
            continue
        DatasetCatalog.register(name, _lister(name))
        MetadataCatalog.get(name).set(
            stuff_classes=list(CITYSCAPES_19.names),
            stuff_colors=[list(color) for color in CITYSCAPES_19.palette],
            ignore_label=IGNORE,
            evaluator_type="sem_seg",
        )


def _lister(name: str) -> Callable[[], list[dict[str, Any]]]:
    def samples() -> list[dict[str, Any]]:
        return [
            {
                "file_name": str(record.image),
                "domain": record.domain,
                "dataset": record.dataset,
                **({} if record.label is None else {"sem_seg_file_name": str(record.label)}),
            }
            for record in get_dataset(name).records()
        ]

    return samples


def training_label_space(names: Sequence[str]) -> LabelSpace:
    """The label space that all labelled datasets of `names` share.

    Args:
        names: as in DATASETS.TRAIN; generated datasets among them are ignored.

    Raises:
        ValueError: a dataset is unknown, none is labelled, or their label spaces differ.
    """
    spaces = {name: _label_space(name) for name in names if not is_generated(name)}
    if not spaces:
        raise ValueError(f"no labelled dataset among {', '.join(names) or 'none'}")
    first, *others = spaces.values()
    if any(other != first for other in others):
        counts = ", ".join(
            f"{name} ({space.num_classes} classes)" for name, space in spaces.items()
        )
        raise ValueError(f"datasets with different label spaces: {counts}")
    return first


def _label_space(name: str) -> LabelSpace:
    get_row(name)  # raises for an unknown name
    return CITYSCAPES_19
