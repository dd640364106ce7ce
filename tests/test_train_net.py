from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_toy import loggers_as_before

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "train_net.py"
BASE = ROOT / "configs" / "base.yaml"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("train_net", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_net"] = module
    spec.loader.exec_module(module)
    with loggers_as_before():
        yield module
    del sys.modules["train_net"]


@pytest.fixture
def fails(tool, capsys):
    """Runs the command and returns what it said when it left with the status for wrong input."""

    def run(*words):
        with pytest.raises(SystemExit) as leaving:
            tool.main([str(word) for word in words])
        assert leaving.value.code == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text

    return run


def test_help_is_fast_and_imports_nothing_heavy():
    program = (
        "import runpy, sys; sys.argv = ['train_net.py', '--help']\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'clouds'} & set(sys.modules)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - started < 3
    for flag in ("--config-file", "--resume", "--eval-only", "--num-gpus", "--num-machines"):
        assert flag in done.stdout
    assert "--machine-rank" in done.stdout
    assert "--dist-url" in done.stdout


def test_no_config_file(fails):
    assert "--config-file is needed" in fails("--eval-only")


def test_flags_after_overrides(fails):
    text = fails("--config-file", BASE, "SEED", "1", "--resume")
    assert "--resume comes after KEY VALUE" in text


def test_config_that_is_not_there(fails):
    assert "no_such.yaml" in fails("--config-file", "no_such.yaml")


def test_wrong_overrides_are_told_together(fails):
    text = fails("--config-file", BASE, "SOLVER.BASE_LRR", "1", "SOLVER.MAX_ITER", "many")
    assert "SOLVER.BASE_LR" in text
    assert "SOLVER.MAX_ITER" in text


def test_more_gpus_than_there_are(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = fails("--config-file", BASE, "--num-gpus", "64")
    assert "--num-gpus is 64, but this machine has 2 usable GPU(s)" in text


def test_a_gpu_that_is_not_there(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = fails("--config-file", BASE, "OUTPUT_DIR", tmp_path, "MODEL.DEVICE", "cuda")
    assert "this machine has 0 usable CUDA GPUs" in text


def test_output_folder_that_cannot_be_written(fails, tmp_path):
    (tmp_path / "file").write_text("")
    text = fails("--config-file", BASE, "OUTPUT_DIR", tmp_path / "file" / "x")
    assert "cannot be written" in text
    assert "OUTPUT_DIR" in text


def test_errors_of_the_program_keep_their_traceback(tool):
    with pytest.raises(ZeroDivisionError), tool.user_errors_in_one_line():
        print(1 / 0)
    with pytest.raises(ValueError, match="literal"), tool.user_errors_in_one_line():
        int("not raised in this project's code")
