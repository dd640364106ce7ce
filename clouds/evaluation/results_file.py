"""Reading the files that an evaluation writes: results.json and per_image.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.json"
IMAGE_SCORES_FILE = "per_image.json"
"""Files with the scores of the datasets, and with those of single images, in OUTPUT_DIR."""


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results.json, whose scores by dataset are checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another file.
    """
    results = _read_json(path)
    datasets = results.get("datasets")
    if not isinstance(datasets, dict) or not all(isinstance(d, dict) for d in datasets.values()):
        raise damaged(path, "it has no scores by dataset")
    iteration = results.get("iteration")
    if iteration is not None and type(iteration) is not int:
        raise damaged(path, f"its iteration is {iteration!r}")
    for name, scores in datasets.items():
        iou, matrix = scores.get("IoU"), scores.get("confusion-matrix")
        if not isinstance(iou, dict):
            raise damaged(path, f"{name} has no IoU by class")
        if matrix and not _is_matrix(matrix, len(iou)):
            raise damaged(path, f"the confusion matrix of {name} is not {len(iou)} x {len(iou)}")
    return results


def read_image_scores(path: Path) -> dict[str, dict[str, float | None]]:
    """mIoU in percent by dataset and image, of a per_image.json; None where it is not defined.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another file.
    """
    content = _read_json(path)
    try:
        return {
            str(dataset): {str(score["file"]): number(score["mIoU"]) for score in scores}
            for dataset, scores in content["datasets"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise damaged(path, f"it has no list of images by dataset ({error!r})") from error


def number(value: object) -> float | None:
    """A finite number of a JSON file; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def damaged(path: Path, reason: str) -> ValueError:
    """The error of a file of an evaluation that cannot be read."""
    return ValueError(
        f"'{path}' is damaged: {reason}. Evaluate again with `clouds eval`, and name the folder "
        "that it writes; or delete the file, to do without its scores."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error).splitlines()[0]) from error
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__}, not an object")
    return content


def _is_matrix(rows: object, size: int) -> bool:
    return (
        isinstance(rows, list)
        and len(rows) == size
        and all(isinstance(row, list) and len(row) == size for row in rows)
        and all(type(pixels) is int and pixels >= 0 for row in rows for pixels in row)
    )
