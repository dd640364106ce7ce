"""TensorBoard's cards, CSV files, Weights & Biases, and the line of progress on a terminal."""

from __future__ import annotations

import csv
import io
import json
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from engine_toy import Toy, toy_batches, toy_config

from clouds.engine import Trainer
from clouds.engine.loggers import build_loggers, cards, evaluation_tag, training_tag
from clouds.engine.metrics import MetricsFile, ProgressLine, is_last_layer_loss
from clouds.environment import Console

RECORD = {
    "iteration": 19,
    "total_loss": 9.0,
    **{f"loss_{name}": 1.0 for name in ("ce", "mask", "dice")},
    **{f"loss_{name}_{layer}": 1.0 for name in ("ce", "mask", "dice") for layer in range(9)},
    "grad_norm": 0.1,
    "lr": 1e-5,
    "lr_backbone": 1e-6,
    "seconds": 1.0,
    "data_seconds": 0.1,
    "images_per_second": 8.0,
    "memory_gib": 20.0,
    "of_a_hook": 3,
    "broken": float("nan"),
}


def scores(value):
    """Of an evaluation on three datasets of 19 classes."""
    per_dataset = {
        f"{name}/{score}": value
        for name in ("cityscapes_val", "bdd_val", "mapillary_val")
        for score in ("mIoU", "pixel-accuracy", "mean-accuracy", *(f"IoU-{i}" for i in range(19)))
    }
    return {**per_dataset, "mean/mIoU": value, "source_val/gta5/mIoU": value}


def trainer_of(folder, *overrides, values=()):
    """Trains the toy; evaluations have these values, one after the other."""
    values = iter(values)

    def evaluate():
        panels = {"toy/0": np.zeros((4, 6, 3), np.uint8)}
        value = next(values)
        return SimpleNamespace(flat=lambda: scores(value), panels=panels)

    cfg = toy_config(folder, "TEST.EVAL_PERIOD", "5", *overrides)
    return Trainer(cfg, Toy(), toy_batches, evaluate=evaluate)


def test_cards():
    shown = cards(RECORD)
    assert shown == {
        **{"loss/total": 9.0, "loss/ce": 1.0, "loss/mask": 1.0, "loss/dice": 1.0},
        **{"optimizer/grad_norm": 0.1, "optimizer/lr": 1e-5, "optimizer/lr_backbone": 1e-6},
        **{"speed/seconds": 1.0, "speed/data_seconds": 0.1, "speed/images_per_second": 8.0},
        **{"speed/memory_gib": 20.0, "train/of_a_hook": 3.0},
    }
    evaluation = cards(scores(50.0), evaluation=True)
    assert len(scores(0)) == 68 and len(evaluation) == 11
    assert evaluation["mIoU/cityscapes_val"] == 50 and evaluation["mIoU/source_val/gta5"] == 50
    assert training_tag("loss_scale") == "optimizer/loss_scale"
    assert training_tag("loss_mask_8") is None and is_last_layer_loss("loss_mask")
    assert not any(map(is_last_layer_loss, ("loss_mask_8", "loss_scale", "total_loss")))
    assert evaluation_tag("average/bdd_val/mIoU") == "mIoU/average/bdd_val"
    assert evaluation_tag("synthia/mIoU-16") == "mIoU-16/synthia"
    for of_one_class in ("bdd_val/boundary-IoU-bus", "sd_x/teacher-where-refined-IoU-bus"):
        assert evaluation_tag(of_one_class) is None


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def as_numbers(row):
    return {name: float(text) for name, text in row.items() if text}


def records(folder, evaluation):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    kept = [line for line in lines if bool(line.pop("evaluation", False)) == evaluation]
    return [{name: value for name, value in line.items() if value is not None} for line in kept]


def test_csv_files_have_the_records_of_metrics_json(tmp_path):
    trainer_of(tmp_path, "LOGGER", ("csv",), values=[1, float("nan"), 3]).train()
    assert not (tmp_path / "tensorboard").exists()
    training = rows(tmp_path / "metrics.csv")
    assert len(training) == 12 and next(iter(training[0])) == "iteration"
    assert [as_numbers(row) for row in training] == records(tmp_path, evaluation=False)
    evaluations = rows(tmp_path / "evaluations.csv")
    assert [row["mean/mIoU"] for row in evaluations] == ["1", "", "3"]
    assert [as_numbers(row) for row in evaluations] == records(tmp_path, evaluation=True)


def test_csv_files_of_a_resumed_run_have_each_iteration_once(tmp_path):
    words = ("LOGGER", ("csv",))
    trainer_of(tmp_path, *words, values=[1, 2, 3]).train()
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    resumed = trainer_of(tmp_path, *words, values=[20, 30])
    assert resumed.resume_or_load(resume=True) == 8
    resumed.train()
    assert [row["iteration"] for row in rows(tmp_path / "metrics.csv")] == list(map(str, range(12)))
    found = [(r["iteration"], r["mean/mIoU"]) for r in rows(tmp_path / "evaluations.csv")]
    assert found == [("4", "1"), ("9", "20"), ("11", "30")]


def test_a_new_number_gets_a_column(tmp_path):
    file = MetricsFile(tmp_path / "metrics.json")
    (logger,) = build_loggers(toy_config(tmp_path, "LOGGER", ("csv",)), file)
    for record in ({"iteration": 0, "a": 1}, {"iteration": 1, "a": 2, "b": 5}, {"iteration": 2}):
        file.write(record)
        logger.training(record)
    text = (tmp_path / "metrics.csv").read_text()
    assert text == "iteration,a,b\n0,1,\n1,2,5\n2,,\n"


def test_csv_cells_of_numbers_that_are_not_finite_are_empty(tmp_path):
    """Of a record that is appended as of one that is written again."""
    file = MetricsFile(tmp_path / "metrics.json")
    (logger,) = build_loggers(toy_config(tmp_path, "LOGGER", ("csv",)), file)
    for i, value in enumerate((1.0, float("inf"), float("nan"))):
        record = {"iteration": i, "grad_norm": value}
        file.write(record)
        logger.training(record)
    text = (tmp_path / "metrics.csv").read_text()
    assert text == "iteration,grad_norm\n0,1.0\n1,\n2,\n"
    logger.start(3)
    assert (tmp_path / "metrics.csv").read_text() == text


def test_metrics_of_earlier_runs_are_all_kept(tmp_path):
    file = MetricsFile(tmp_path / "metrics.json")
    (tmp_path / "metrics.old2.json").write_text("two")
    for name in ("one", "three"):
        file.path.write_text(name)
        file.set_aside()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    expected = {"1": "one", "2": "two", "3": "three"}
    assert found == {f"metrics.old{number}.json": text for number, text in expected.items()}


def test_a_missing_package_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("clouds.engine.loggers.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"wandb, whose package is missing: pip .*\[wandb\]"):
        trainer_of(tmp_path, "LOGGER", ("wandb",))


def log_entries(content):
    """Entries of a file in LevelDB's log format, after wandb's header of 7 bytes.

    In blocks of 32 KiB, an entry or a part of one is: CRC (4 bytes), length (2), kind (1), bytes.
    """
    at, entry = 7, b""
    while at < len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        entry += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            yield entry
            entry = b""


def wandb_history(folder):
    """Rows of the numbers in the files of an offline run, which `wandb sync` sends."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for entry in log_entries(path.read_bytes()):
            record = Record.FromString(entry)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
                found.append(row)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer_of(tmp_path, "LOGGER", ("wandb",), values=[1, 2, 3]).train()
    history = wandb_history(tmp_path)
    losses = {row["iteration"]: row["loss/total"] for row in history if "loss/total" in row}
    expected = {row["iteration"]: row["total_loss"] for row in records(tmp_path, False)}
    assert losses == pytest.approx(expected) and len(losses) == 12
    found = [(row["iteration"], row["mIoU/mean"]) for row in history if "mIoU/mean" in row]
    assert found == [(4, 1), (9, 2), (11, 3)]
    assert sum(any(n.startswith("images/toy/0") for n in row) for row in history) == 3
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 3
    run_id = (tmp_path / "wandb_id.txt").read_text()
    assert list(tmp_path.glob(f"wandb/offline-run-*-{run_id}"))


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_progress_is_one_line_in_color_on_a_terminal(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "clouds.engine.hooks")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    trainer_of(tmp_path, values=[1, 2, 3]).train()
    text = screen.getvalue()
    assert "training" in text and "12/12" in text and "\x1b[32m" in text  # green
    assert "loss " in text and "lr " in text
    assert "iteration 12/12" not in caplog.text


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_plain_lines_where_a_stream_is_no_terminal(tmp_path, monkeypatch, caplog, name):
    caplog.set_level("INFO", "clouds.engine.hooks")
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.StringIO() if stream == name else Terminal())
    trainer_of(tmp_path, values=[1, 2, 3]).train()
    assert "iteration 12/12" in caplog.text
    assert "training:" not in sys.stderr.getvalue()


def test_messages_are_above_the_line(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    line = ProgressLine(10, 2)
    line.update()
    import logging

    Console(screen).emit(logging.LogRecord("x", logging.INFO, "", 0, "saved", (), None))
    line.close()
    shown = [part.split("\r")[-1] for part in screen.getvalue().split("\n")]
    assert "saved" in shown  # on a line of its own
