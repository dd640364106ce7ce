"""`clouds ablate` and `clouds compare`, with a stand-in for training."""

from __future__ import annotations

import csv

import pytest
from engine_toy import restored_loggers

from clouds.ablation.cluster import POLL_SECONDS
from clouds.cli import ablate, compare


@pytest.fixture(autouse=True)
def logging_as_before():
    with restored_loggers():
        yield


def test_runs_then_a_table(ablation_file, fake_train, tmp_path, capsys):
    assert ablate.main([str(ablation_file), "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 runs are to do" in out and "+10.0 to +10.0" in out
    lines = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    assert [line["mean"] for line in lines] == ["20.5", "30.5"]
    assert {p.name for p in (tmp_path / "out").glob("table.*")} == {
        "table.md", "table.tex", "table.csv",
    }  # fmt: skip
    assert ablate.main([str(ablation_file)]) == 0
    assert "0 of 4 runs are to do" in capsys.readouterr().out


def test_a_failed_run_is_told_and_tried_again(ablation_file, fake_train, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "fast/seed_1")
    assert ablate.main([str(ablation_file)]) == 1
    out = capsys.readouterr().out
    assert "1 of 2" in out and "fast, seed 1: failed, exit status 2: error: no such data" in out
    monkeypatch.delenv("FAIL")
    assert ablate.main([str(ablation_file), "--table"]) == 0
    assert "fast, seed 1: no results yet" in capsys.readouterr().out
    assert ablate.main([str(ablation_file)]) == 0
    assert "1 of 4 runs are to do" in capsys.readouterr().out


def test_a_dry_run_shows_commands_and_starts_nothing(ablation_file, tmp_path, capsys):
    assert ablate.main([str(ablation_file), "SOLVER.MAX_ITER", "4", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# slow, seed 0: to do"
    assert lines[1].startswith(
        "clouds train --config-file demo/warmup --resume SOLVER.BASE_LR 0.02"
    )
    assert lines[1].endswith(f"SOLVER.MAX_ITER 4 SEED 0 OUTPUT_DIR {tmp_path}/out/slow/seed_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.MAX_ITERR", "4"], "SOLVER.MAX_ITERR"),
        (["--only", "x"], "no setting 'x'"),
        (["--jobs", "0"], "at least 1"),
        (["--job-options", "a=1"], "--job-options is for --cluster"),
        (["--cluster", "local", "--jobs", "2"], "--jobs is for runs on this machine"),
    ],
)
def test_usage(ablation_file, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        ablate.main([str(ablation_file), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_clusters_are_those_of_the_runner(ablation_file):
    for name in POLL_SECONDS:
        assert ablate.parse([str(ablation_file), "--cluster", name]).cluster == name


def test_a_numbered_device_is_refused(ablation_file, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(SystemExit):
        ablate.main([str(ablation_file), "MODEL.DEVICE", "cuda:1"])
    assert "an ablation chooses the GPU of each run" in capsys.readouterr().err


def test_compare_makes_the_same_table(ablation_file, fake_train, tmp_path, capsys):
    ablate.main([str(ablation_file)])
    capsys.readouterr()
    folders = {n: [f"{tmp_path}/out/{n}/seed_{s}" for s in (0, 1)] for n in ("slow", "fast")}
    groups = [w for n, f in folders.items() for w in ("--group", f"{n}={','.join(f)}")]
    save = [str(tmp_path / f"x.{e}") for e in ("csv", "tex")]
    compare.main([*groups, "--save", *save])
    assert (tmp_path / "x.csv").read_text() == (tmp_path / "out/table.csv").read_text()
    assert (tmp_path / "x.tex").read_text() == (tmp_path / "out/table.tex").read_text()
    assert capsys.readouterr().out == (tmp_path / "out/table.md").read_text()


def test_compare_needs_runs_with_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([])
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "has no results.json: it has not been evaluated" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path), "--save", "a.pdf"])
    assert "must be one of .md, .tex, .csv" in capsys.readouterr().err
