"""Files of a run that a crash of the machine has damaged."""

from __future__ import annotations

import json

import pytest

from clouds.config import get_cfg
from clouds.engine.config_changes import changed_keys, config_value
from clouds.engine.metrics import MetricsFile

GOOD = '{"iteration": 19, "total_loss": 3.25}\n'

FAULTY_LINES = {
    "not UTF-8": b"\xff\xfe",
    "zeros": bytes(64),
    "incomplete": b'{"iteration": 3',
    "a number": b"3",
    "a list": b"[1, 2]",
    "no iteration": b'{"total_loss": 1.0}',
    "no whole iteration": b'{"iteration": null}',
    "text as iteration": b'{"iteration": "19"}',
    "too deep": b"[" * 100_000,
    "too many digits": b'{"iteration": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("line", FAULTY_LINES.values(), ids=FAULTY_LINES)
def test_faulty_lines_of_metrics_are_skipped_and_told(line, tmp_path, caplog):
    path = tmp_path / "metrics.json"
    path.write_bytes(GOOD.encode() + line + b"\n" + GOOD.replace("19", "39").encode())
    file = MetricsFile(path)
    assert [record["iteration"] for record in file.records()] == [19, 39]
    assert f"{path}:2: skipped" in caplog.text
    file.start_from(30)
    assert path.read_text() == GOOD
    file.write_evaluation(19, {"camvid_val/mIoU": 41.5})
    assert file.has_evaluation(19)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [19, 19]


@pytest.mark.parametrize(
    "config, reason",
    [
        (None, "no text, but a NoneType"),
        ([1], "no text, but a list"),
        ("a: [", "not YAML"),
        ("a: \0", "not YAML"),
        ("[" * 10_000, "not YAML"),
        ("!!int x", "not YAML"),
        ("just text", "just text, not KEY: VALUE pairs"),
    ],
)
def test_a_damaged_config_in_a_checkpoint_is_told_and_not_compared(config, reason):
    with pytest.raises(ValueError) as error:
        changed_keys(config, get_cfg())
    assert str(error.value).startswith(f"the config in the checkpoint is {reason}")
    assert "\n" not in str(error.value)


def test_an_undamaged_config_is_compared():
    cfg = get_cfg()
    assert changed_keys(cfg.dump(), cfg) == []
    assert changed_keys(cfg.dump().replace("SEED: ", "SEED: 7"), cfg) != []


def test_a_saved_config_that_doubles_itself_is_not_expanded():
    # 2^40 values if it were
    levels = [f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 41)]
    config = "\n".join(["a0: &a0 {x: 1, y: 2}", *levels])
    with pytest.raises(ValueError, match="not YAML"):
        changed_keys(config, get_cfg())
    assert config_value(config, "SEED") is None
    assert config_value("SEED: 3", "SEED") == 3
