"""Confusion matrices of a report: shares of the labeled pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NUM_EXAMPLES = 3
MIN_SHARE = 0.01
"""Smallest share that is written into a cell and named among the confusions."""


@dataclass(frozen=True)
class MatrixRow:
    """A labeled class: shares of its pixels by predicted class, 0 to 1, and their number."""

    name: str
    shares: tuple[float, ...]
    pixels: int


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix without the classes that are neither labeled nor predicted.

    Attributes:
        run: name of the run.
        columns: predicted classes.
        rows: labeled classes.
        confusions: the largest shares off the diagonal, such as `42 % of rider is person`.
    """

    run: str
    columns: tuple[str, ...]
    rows: tuple[MatrixRow, ...]
    confusions: tuple[str, ...]


def normalized(run: str, scores: dict[str, Any]) -> Matrix | None:
    """The matrix of a dataset in results.json; None if it has none, or no pixel is counted."""
    counts: list[list[int]] = scores.get("confusion-matrix") or []
    names = list(scores["IoU"])
    labeled = [i for i, row in enumerate(counts) if sum(row)]
    if not labeled:
        return None
    predicted = [i for i in range(len(names)) if any(row[i] for row in counts)]
    shown = sorted({*labeled, *predicted})
    rows = []
    confusions = []
    for i in labeled:
        pixels = sum(counts[i])
        shares = [counts[i][j] / pixels for j in shown]
        rows.append(MatrixRow(names[i], tuple(shares), pixels))
        confusions += [
            (share, f"{100 * share:.0f} % of {names[i]} is predicted as {names[j]}")
            for j, share in zip(shown, shares, strict=True)
            if i != j and share >= MIN_SHARE
        ]
    largest = sorted(confusions, key=lambda found: -found[0])[:NUM_EXAMPLES]
    columns = tuple(names[i] for i in shown)
    return Matrix(run, columns, tuple(rows), tuple(text for _, text in largest))
