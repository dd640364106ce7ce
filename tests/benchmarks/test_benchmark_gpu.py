"""benchmarks/gpu.py: floors and ratios by hand, and the whole script on small models on a CPU."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("transformers")
pytest.importorskip("segment_anything")
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_sections  # noqa: E402
from gpu_figures import FAILED, SKIPPED, TIMED_OUT, Ceilings, Figure, Goal, Report, Section  # noqa: E402

CEILINGS = Ceilings(copy=100.0, product={"float32": 10.0, "bfloat16": 200.0})
WORDS = ["--device", "cpu", "--small", "--repeats", "1"]


def section():
    plain = Figure("a", "plain", (4.0, 6.0, 5.0), images=10, tflop=20.0, peak_mib=300.0)
    fast = Figure("a", "fast", (0.5,), "bfloat16", 10, 20.0, traffic_gib=30.0, peak_mib=100.0)
    other = Figure("b", "plain", (3.0,))
    return Section("s", figures=[plain, fast, other])


def test_floors_shares_and_ratios_by_hand():
    plain, fast, other = section().figures
    assert CEILINGS.floor(plain) == 2.0  # 20 TFLOP at 10 TFLOP/s
    assert CEILINGS.floor(fast) == 0.3  # the copy takes longer than 20 TFLOP at 200 TFLOP/s
    assert CEILINGS.floor(other) is None
    values = plain.to_dict(CEILINGS)
    assert (values["median_s"], values["times_floor"]) == (5.0, 2.5)
    assert (values["images_per_second"], values["share_of_bf16_product"]) == (2.0, 0.02)
    assert [section().ratio(f) for f in section().figures] == [1, 10, 1]


def test_goals_and_tables():
    goals = [
        Goal("s", "a", "fast", 6),
        Goal("s", "a", "fast", 4, "memory"),
        Goal("s", "a", "fast", 0.2, "share"),
        Goal("t", "a", "fast", 1),
    ]
    failed = Section("t", FAILED, problem="Traceback\nValueError: broken")
    report = Report({"card": "none"}, [section(), failed], goals, CEILINGS)
    assert [g.measured(report.sections, CEILINGS) for g in goals] == [10, 3, 0.2, None]
    text = report.to_markdown()
    assert [line.split("|")[-2].strip() for line in text.splitlines()[-4:]] == [
        *("yes", "no", "yes", "not measured")
    ]
    assert "failed: ValueError: broken" in text
    json.dumps(report.to_dict())


def test_bytes_of_attention_by_hand():
    layer = (torch.zeros(100), torch.zeros(50), torch.zeros(10))
    gradient = torch.zeros(20)
    # forward 160 values and the output; backward 160, the gradient, and gradients of the 160
    expected = 2 * 4 * (160 + 20 + 160 + 20 + 160)
    assert gpu_sections.attention_traffic([], [layer, layer], gradient) == expected


def test_small_sections_on_a_cpu(tmp_path):
    assert gpu.main([*WORDS, "--out", str(tmp_path), "--only", "backbone", "evaluation"]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [s["status"] for s in written["sections"]] == ["measured"] * 2
    figures = [f for s in written["sections"] for f in s["figures"]]
    assert {f["way"] for f in figures} == {"published code", "ours", "ours, bf16"}
    assert all(f["median_s"] > 0 and f["times_floor"] > 0 and f["tflop"] > 0 for f in figures)
    assert written["sections"][0]["notes"] == {"results in float32": "agree"}
    assert written["goals"] == [] and written["machine"]["device"] == "cpu"
    assert "## evaluation" in (tmp_path / "gpu.md").read_text()


def test_results_that_differ_are_noted():
    def compare():
        raise AssertionError("res2 differs by 0.5")

    assert gpu_sections.comparison(lambda: None) == {"results in float32": "agree"}
    noted = gpu_sections.comparison(compare)
    assert noted == {"results in float32": "DIFFER: res2 differs by 0.5"}


def test_a_section_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def broken(options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_sections, "SECTIONS", {"a": broken, "b": lambda options: section()})
    assert gpu.main([*WORDS, "--out", str(tmp_path)]) == 1
    first, second = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert (first["status"], second["status"]) == (FAILED, "measured")
    assert "no such kernel" in first["problem"]
    assert gpu.main([*WORDS, "--out", str(tmp_path), "--minutes", "0"]) == 0
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {s["status"] for s in sections} == {SKIPPED}


@pytest.mark.parametrize("option", ["--minutes", "--section-minutes"])
def test_a_section_that_takes_too_long_is_ended_and_is_no_failure(tmp_path, monkeypatch, option):
    def endless(options):
        try:
            while True:
                time.sleep(0.01)
        except Exception:  # as compilers do
            return section()

    before = signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(gpu_sections, "SECTIONS", {"a": endless, "b": lambda options: section()})
    monkeypatch.setattr(gpu, "measure_ceilings", lambda *args: CEILINGS)
    monkeypatch.setattr(gpu, "machine", lambda *args: {})
    started = time.monotonic()
    assert gpu.main([*WORDS, "--out", str(tmp_path), option, "0.01"]) == 0
    assert time.monotonic() - started < 30
    first, second = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    expected = "measured" if option == "--section-minutes" else SKIPPED
    assert (first["status"], second["status"]) == (TIMED_OUT, expected)
    assert "--section-minutes" in first["problem"]
    assert "out of time: ended after" in (tmp_path / "gpu.md").read_text()
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.slow
def test_all_small_sections_on_a_cpu(tmp_path):
    limits = ["--minutes", "120", "--section-minutes", "60"]
    assert gpu.main([*WORDS, "--out", str(tmp_path), *limits]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [s["name"] for s in written["sections"]] == list(gpu_sections.SECTIONS)
    assert {s["status"] for s in written["sections"]} == {"measured"}
