"""benchmarks/growth.py: rows of a table differ in one quantity."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("transformers")
pytest.importorskip("segment_anything")
sys.path.insert(0, str(ROOT / "benchmarks"))
import growth  # noqa: E402
from test_benchmark_step import SETTINGS  # noqa: E402

TINY = ["--clip", "clouds_tiny", "--sam", "tiny", "--size", "64", "--source", "1"]
TINY += ["--generated", "1", "--untimed", "0", *SETTINGS]


@pytest.mark.parametrize(("rows", "columns"), growth.COMPONENTS)
def test_number_of_rectangles(rows, columns):
    label = growth.rectangles(384, rows, columns)
    square = np.ones((3, 3))  # connected at corners, too
    counts = [ndimage.label(label == kind, square)[1] for kind in np.unique(label)]
    assert label.shape == (384, 384)
    assert sum(counts) == rows * columns
    sizes = [(label == kind).sum() / n for kind, n in zip(np.unique(label), counts, strict=True)]
    assert max(sizes) < 1.1 * min(sizes)


def test_tables(monkeypatch, capsys):
    """Rows and their order, and that only generated images need teacher and refiner."""
    for name, values in {
        "SIZES": (1, 2),
        "IMAGES": (1, 2),
        "GENERATED": (0, 2),
        "COMPONENTS": ((1, 2), (2, 2)),
    }.items():
        monkeypatch.setattr(growth, name, values)
    steps = []
    measure = growth.step.measure

    def counted(ways, untimed, repeats, device):
        (title,) = ways
        steps.append(title)
        return measure(ways, untimed, repeats, device)

    monkeypatch.setattr(growth.step, "measure", counted)
    growth.main(TINY)
    out = capsys.readouterr().out
    assert steps == ["64", "128", "1", "2", "0", "2", "2", "4"]
    tables = out.split("\n\n")[1:]
    assert [table.split()[0] for table in tables if table.strip()] == [
        "crop", "labelled", "generated", "components",
    ]  # fmt: skip
    rows = [line.split() for line in out.splitlines() if re.fullmatch(r"[\d. ]+", line)]
    assert [row[0] for row in rows] == steps
    teachers = [float(row[3]) > 0 or float(row[4]) > 0 for row in rows]
    assert teachers == [True, True, False, False, False, True, True, True]


@pytest.mark.parametrize("words", [["--phase", "warmup"], ["--only=published"]])
def test_options_that_the_script_sets_are_refused(words):
    with pytest.raises(SystemExit, match="leave out --"):
        growth.main([*TINY, *words])
