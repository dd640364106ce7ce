from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import dataset_files
import pytest
import torch
import yaml
from engine_toy import restored_loggers, script_environment
from tiny_model import tiny_config

import clouds
from clouds.cli import train

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "train_net.py"
BASE = ROOT / "configs" / "base.yaml"


@pytest.fixture
def tool():
    with restored_loggers():
        yield train


@pytest.fixture
def fails(tool, capsys):
    """Runs the command, which must exit with the status of an input error; returns its message."""

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
        f"sys.path.insert(0, {str(TOOL.parent)!r})\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=script_environment(),
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


def test_missing_config(fails):
    assert "no_such.yaml" in fails("--config-file", "no_such.yaml")


def test_invalid_overrides_are_reported_together(fails):
    text = fails("--config-file", BASE, "SOLVER.BASE_LRR", "1", "SOLVER.MAX_ITER", "many")
    assert "SOLVER.BASE_LR" in text
    assert "SOLVER.MAX_ITER" in text


def test_more_gpus_than_there_are(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = fails("--config-file", BASE, "--num-gpus", "64")
    assert "--num-gpus is 64, but this machine has 2 usable GPU(s)" in text


def test_missing_gpu(fails, monkeypatch, tmp_path):
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    for number in range(4):
        dataset_files.write(root, "gta5", number, (48, 64))
        dataset_files.write(root, "cityscapes_val", number, (48, 64))
    return root


@pytest.fixture
def command(data, tmp_path, monkeypatch):
    """Command line that trains a tiny model for four iterations and evaluates it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    settings = {
        "INPUT__CROP__SIZE": (64, 64),
        "DATASETS__TEST": ("cityscapes_val",),
        "DATALOADER__NUM_WORKERS": 0,
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__MAX_ITER": 4,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        "SOLVER__BASE_LR": 1e-3,
        "LOG_PERIOD": 1,
        "TEST__EVAL_PERIOD": 2,
        "TEST__SHORT_SIDE": 32,
        "TEST__VISUALIZED_IMAGES": 1,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_config(**settings).dump())
    return ["--config-file", str(path)]


def records_of(folder):
    lines = (folder / "metrics.json").read_text().splitlines()
    timings = {"seconds", "data_seconds", "images_per_second", "memory_gib"}
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]


def final_weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def evaluation_in(folder):
    """The only folder of an evaluation in OUTPUT_DIR."""
    (found,) = (folder / "eval").iterdir()
    return found


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_train_evaluate_and_build(tool, command, tmp_path, capsys):
    out = tmp_path / "out"
    tool.main([*command, "OUTPUT_DIR", str(out)])
    log = (out / "log.txt").read_text()
    first = log.splitlines()[0]
    for fact in (f"clouds {clouds.__version__}", "d2 backend", "torch", "device cpu"):
        assert fact in first
    console = capsys.readouterr().out
    assert "mIoU" in console
    assert "iteration 4/4" in console
    records = records_of(out)
    assert [r["iteration"] for r in records] == [0, 1, 1, 2, 3, 3]
    assert sum(name.startswith("loss_") for name in records[0]) == 3 * 4  # four predictions
    result = json.loads((out / "results.json").read_text())
    assert result["iteration"] == 3
    assert result["weights"]["file"] == str(out / "model_final.pth")
    assert result["mean"]["mIoU"] == pytest.approx(records[-1]["cityscapes_val/mIoU"])
    assert list((out / "tensorboard").iterdir())
    dumped = yaml.safe_load((out / "config.yaml").read_text())
    assert dumped["SOLVER"]["MAX_ITER"] == 4
    assert "# backend:" in (out / "config.yaml").read_text()

    weights = str(out / "model_final.pth")
    again = tmp_path / "again"
    tool.main([*command, "--eval-only", "OUTPUT_DIR", str(again), "MODEL.WEIGHTS", weights])
    found = evaluation_in(again)
    assert found.name == "native_cityscapes_val_out_model_final"
    evaluated = json.loads((found / "results.json").read_text())
    assert evaluated["mean"] == result["mean"]
    assert [path.name for path in again.iterdir()] == ["eval"]
    assert not (found / "config.yaml").exists()
    assert "RANDOM" not in (found / "log.txt").read_text()

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    for _ in range(2):
        tool.main([*command, "--eval-only", "--resume", "OUTPUT_DIR", str(out)])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = evaluation_in(out)
    assert found.name == "native_cityscapes_val_model_final"
    for folder in (found, *(found / "earlier").iterdir()):
        assert json.loads((folder / "results.json").read_text())["mean"] == result["mean"]

    tool.main([*command, "--eval-only", "OUTPUT_DIR", str(tmp_path / "random")])
    found = evaluation_in(tmp_path / "random")
    assert "RANDOM weights" in (found / "log.txt").read_text()

    built = clouds.build(command[1], ["MODEL.WEIGHTS", "unused"], weights)
    assert not built.training
    assert same(dict(built.state_dict()), final_weights(out))
    fresh = clouds.build(command[1])
    assert same(dict(fresh.state_dict()), dict(clouds.build(command[1], ["SEED", 0]).state_dict()))
    assert not same(dict(fresh.state_dict()), dict(built.state_dict()))


def test_a_resumed_run_equals_an_uninterrupted_one(tool, command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tool.main([*command, "OUTPUT_DIR", str(whole)])
    killed.mkdir()
    # The files after a kill in iteration 2, with the checkpoint after iteration 1.
    for name in ("model_0000001.pth", "metrics.json"):
        (killed / name).write_bytes((whole / name).read_bytes())
    (killed / "last_checkpoint").write_text("model_0000001.pth")
    tool.main([*command, "--resume", "OUTPUT_DIR", str(killed)])
    assert records_of(killed) == records_of(whole)
    assert same(final_weights(killed), final_weights(whole))


def test_an_evaluation_uses_the_checkpoint_before_a_torn_one(tool, command, tmp_path):
    """As `--resume` does in training."""
    out = tmp_path / "out"
    tool.main([*command, "OUTPUT_DIR", str(out), "DATASETS.TEST", "()"])
    torn = out / "model_final.pth"
    torn.write_bytes(torn.read_bytes()[:-1000])
    tool.main([*command, "--eval-only", "--resume", "OUTPUT_DIR", str(out)])
    found = evaluation_in(out)
    assert found.name == "native_cityscapes_val_model_0000001"
    weights = json.loads((found / "results.json").read_text())["weights"]
    assert weights["file"] == str(out / "model_0000001.pth")
    (line,) = [n for n, text in enumerate(lines_of(found)) if "model_final.pth' (" in text]
    assert f"is used: '{out / 'model_0000001.pth'}' (iteration 1)." in lines_of(found)[line + 1]


def lines_of(folder):
    return (folder / "log.txt").read_text().splitlines()


def files_in(folder):
    """Contents without the log, which in this process also gets what another run would say."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_a_used_folder_needs_resume_or_overwrite(tool, fails, command, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["OUTPUT_DIR", str(out), "DATASETS.TEST", "()"]
    tool.main([*command, *words, "SOLVER.MAX_ITER", "2"])
    before = files_in(out)
    text = fails(*command, *words)
    assert text.startswith(f"error: OUTPUT_DIR '{out}' holds a run (")
    assert text.count("\n") == 1
    assert files_in(out) == before
    text = fails(*command, "--resume", "--overwrite", *words)
    assert "not allowed with argument --resume" in text
    assert "--overwrite is for training" in fails(*command, "--eval-only", "--overwrite")

    tool.main([*command, "--overwrite", *words])
    (moved,) = (out / "earlier").iterdir()
    assert files_in(moved) == before
    assert f"the earlier run are now in '{moved}'" in (out / "log.txt").read_text()
    assert [r["iteration"] for r in records_of(out)] == [0, 1, 2, 3]
    tool.main([*command, "--resume", *words, "SOLVER.MAX_ITER", "5"])
    assert [r["iteration"] for r in records_of(out)] == [0, 1, 2, 3, 4]


def test_a_folder_in_use_is_refused_and_left_alone(tool, fails, command, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    held = {"host": "elsewhere", "boot": "", "namespace": "", "pid": 7, "start": "", "since": "x"}
    (out / "run.lock").write_text(json.dumps(held))
    for flags in ([], ["--resume"], ["--overwrite"]):
        text = fails(*command, *flags, "OUTPUT_DIR", out)
        assert text.startswith(f"error: OUTPUT_DIR '{out}' is in use by a run (process 7 on")
        assert text.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["run.lock"]


def test_a_full_disk_is_one_line(tool, fails, command, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # a checkpoint has 9 MB
    try:
        text = fails(*command, "OUTPUT_DIR", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert text.splitlines()[-1] == (
        "error: File too large. A file of the run cannot be written. Free space, then add --resume."
    )
    assert not list((tmp_path / "out").glob("*.pth"))
    assert "there is no checkpoint" in (tmp_path / "out" / "log.txt").read_text()


def test_a_name_that_is_not_utf8(fails, command, tmp_path):
    text = fails(*command, "OUTPUT_DIR", os.fsdecode(bytes(tmp_path) + b"/o\xff"))
    assert "o\\udcff' has bytes that are not utf-8" in text
    assert "OUTPUT_DIR <folder>" in text
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.slow
def test_a_console_that_is_closed_does_not_stop_a_run(command, tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m clouds train {' '.join(command)} OUTPUT_DIR {tmp_path}/out 2>&1"
        " | head -c 10; echo ${PIPESTATUS[0]}",
        shell=True,
        executable="/bin/bash",
        env=script_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.stdout[10:], done.stderr) == ("0\n", "")
    assert (tmp_path / "out" / "model_final.pth").is_file()
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("the console is closed (Broken pipe); messages are only here") == 1
    assert "results in" in log


@pytest.mark.slow
def test_ascii_terminal_without_home_and_name_of_the_user(command, tmp_path):
    environment = {
        **{k: v for k, v in script_environment().items() if k not in ("HOME", "USER", "LOGNAME")},
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "PYTHONIOENCODING": "ascii:strict",
    }
    done = subprocess.run(
        [sys.executable, "-m", "clouds", "train", *command, "OUTPUT_DIR", str(tmp_path / "o")],
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"\\u2013" in done.stdout  # the dash of a class without a score
    assert "\u2013" in (tmp_path / "o" / "log.txt").read_text(encoding="utf-8")


def test_exit_status_of_divergence(tool, command, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as leaving:
        tool.main([*command, "OUTPUT_DIR", str(out), "MODEL.MASK_FORMER.MASK_WEIGHT", "1e39"])
    assert leaving.value.code == 3
    text = capsys.readouterr().out
    assert "training diverged in iteration 0: loss_mask is inf" in text
    assert text.count(".png") == 2


@pytest.mark.parametrize("when", ["train", "evaluate"])
def test_missing_weights(fails, command, tmp_path, when):
    words = ["--eval-only"] if when == "evaluate" else []
    words += ["OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", "no_such.pth"]
    assert "checkpoint 'no_such.pth' does not exist" in fails(*command, *words)


@pytest.mark.parametrize("when", ["train", "evaluate"])
@pytest.mark.parametrize("address", ["detectron2://a/R-50.pkl", "https://a.org/b.pth", "s3://a/b"])
def test_addresses_of_weights(fails, command, tmp_path, when, address):
    words = ["--eval-only"] if when == "evaluate" else []
    text = fails(*command, *words, "OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", address)
    assert "It looks like an address; download what is there, and name the file." in text
    assert text.count("\n") == 1


def test_a_folder_of_weights(fails, command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_final.pth").write_bytes(b"")
    words = ["OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "run"]
    text = fails(*command, *words)
    assert "is a folder. Name one of its files, newest first: model_final.pth" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
@pytest.mark.parametrize("name", ["cityscapess_val", "synthia"])
def test_missing_data_is_reported_before_training(fails, command, tmp_path, key, name):
    text = fails(*command, "OUTPUT_DIR", tmp_path / "out", key, f"('{name}',)")
    assert name in text
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.slow
def test_two_processes_of_the_real_model_train_as_one(command, tmp_path):
    for processes in (1, 2):
        words = ["--num-gpus", str(processes), "MODEL.DEVICE", "cpu"]
        # Adam makes full steps for gradients that are only rounding errors, as for some biases.
        words += ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.1"]
        words += ["OUTPUT_DIR", str(tmp_path / str(processes))]
        program = [sys.executable, str(TOOL), *command, *words]
        subprocess.run(program, env=script_environment(), check=True, capture_output=True)
    one, two = (records_of(tmp_path / str(processes)) for processes in (1, 2))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            close = None if b[name] is None else pytest.approx(b[name], rel=1e-5, abs=1e-5)
            assert a[name] == close, name
    first, second = (final_weights(tmp_path / str(processes)) for processes in (1, 2))
    early = torch.load(tmp_path / "1" / "model_0000001.pth", weights_only=True)["model"]
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-5)
    assert max((first[name] - early[name]).abs().max() for name in first) > 1e-4


def test_importing_the_package_is_light():
    program = "import sys, clouds; assert clouds.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
