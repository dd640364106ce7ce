"""Tables of three settings, by hand."""

from __future__ import annotations

import csv
import io

import pytest
from fake_train import results

from clouds.ablation.scores import RunResults
from clouds.ablation.table import Row, Table


def row(name, scores, planned=None, notes=()):
    found = {s: RunResults(None, results(s, v, 1, {})) for s, v in scores.items()}
    return Row(name, found, planned or len(found), notes)


TABLE = Table(
    (
        row("base_line", {0: 10.0, 1: 12.0}),
        row("a | b", {0: 11.0, 1: 15.0}),
        row("half", {1: 11.0}, planned=2, notes=("half, seed 0: failed.",)),
        row("none", {}, planned=2),
    ),
    {"mIoU": ("mean/mIoU",), "acc": ("*/pixel-accuracy",)},
    "base_line",
)


def test_markdown():
    """Differences 1 and 3: mean 2, standard error 1, t(0.975, 1) = 12.706."""
    lines = [[c.strip() for c in line.split(" | ")] for line in TABLE.markdown().splitlines()]
    assert lines[0] == [
        "| setting", "seeds", "mIoU", "Δ mIoU", "95% interval", "acc |",
    ]  # fmt: skip
    assert lines[2][1:] == ["2", "11.0 ± 1.4", "–", "–", "22.0 ± 2.8 |"]
    assert lines[3] == [r"| a \| b", "2", "13.0 ± 2.8", "+2.0", "−10.7 to +14.7", "26.0 ± 5.7 |"]
    assert lines[4][1:] == ["1 of 2", "11.0", "−1.0", "–", "22.0 |"]
    assert lines[5][1:5] == ["0 of 2", "–", "–", "–"]
    assert "over the seeds 0, 1; Δ mIoU: mean difference to 'base_line'" in TABLE.markdown()
    assert TABLE.markdown().endswith("half, seed 0: failed.")


def test_csv_has_all_digits():
    lines = list(csv.DictReader(io.StringIO(TABLE.csv())))
    assert len(lines) == 8
    line = lines[2]
    assert (line["setting"], line["metric"], line["seeds"]) == ("a | b", "mIoU", "0 1")
    assert line["values"] == "11.0 15.0"
    numbers = [float(line[k]) for k in ("mean", "std", "difference", "low", "high", "pairs")]
    assert numbers == pytest.approx([13, 8**0.5, 2, 2 - 12.7062047, 2 + 12.7062047, 2])
    assert (lines[4]["runs"], lines[4]["planned"], lines[4]["std"]) == ("1", "2", "")


def test_latex():
    text = TABLE.latex()
    assert r"base\_line" in text and r"11.0 $\pm$ 1.4" in text and "$-$10.7 to +14.7" in text
    assert r"\toprule" in text and "$\\Delta$ mIoU" in text
    assert r"95\% interval" in text
    assert text.isascii() or "–" not in text


def test_one_row_has_no_difference():
    table = Table((row("a", {0: 1.0}),), {"mIoU": ("mean/mIoU",)}, "a")
    assert "Δ" not in table.markdown()


def test_the_extension_is_the_format(tmp_path):
    for name in ("t.md", "t.tex", "t.csv"):
        TABLE.write(tmp_path / name)
    assert (tmp_path / "t.csv").read_text() == TABLE.csv()
    with pytest.raises(ValueError, match=r"must be one of .md, .tex, .csv"):
        TABLE.write(tmp_path / "t.txt")
