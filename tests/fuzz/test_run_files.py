"""Mutated files of a training run and of a folder of generated images."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import torch
from fuzzing import ACCEPTED, VALUES, fuzz, mutate, mutations
from hypothesis import strategies as st
from torch import nn

from clouds.config import get_cfg
from clouds.data.datasets.manifest import Entry, append_entry, read_manifest
from clouds.engine.checkpoint import Checkpointer
from clouds.engine.config_changes import changed_keys
from clouds.engine.metrics import MetricsFile
from clouds.generation.job import differences, read_record
from clouds.self_training.refiners.sam.embedding_cache import EmbeddingCache

METRICS = (
    b'{"iteration": 19, "total_loss": 3.25, "loss_ce": 2.0, "lr": 0.0001}\n'
    b'{"iteration": 39, "total_loss": null, "loss_ce": 1.5, "lr": 0.0001}\n'
    b'{"iteration": 39, "evaluation": true, "camvid_val/mIoU": 41.5}\n',
    b"",
    b'{"iteration": 0}\n{"iteration": 1}\n{"iter',
)


def iterations(text):
    return [json.loads(line)["iteration"] for line in text.splitlines()]


def check_metrics(attempt, tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    file = MetricsFile(path)
    outcome, _ = attempt(lambda: file.start_from(20), "metrics.json")
    if outcome == ACCEPTED:
        file.write_evaluation(5, {"x/mIoU": 1.0})
        file.write_evaluation(5, {"x/mIoU": 2.0})
        assert file.has_evaluation(5)
        found = iterations(path.read_text())
        assert all(number < 20 for number in found) and 5 in found


@fuzz("metrics.json, bytes", 4000, drawn=mutations(len(METRICS)))
def test_metrics_bytes(attempt, tmp_path, drawn):
    seed, changes = drawn
    check_metrics(attempt, tmp_path, mutate(METRICS[seed], changes))


@fuzz("metrics.json, values", 2000, iteration=VALUES, record=VALUES)
def test_metrics_values(attempt, tmp_path, iteration, record):
    lines = [json.dumps({"iteration": iteration, "lr": 0.1}), json.dumps(record), ""]
    check_metrics(attempt, tmp_path, "\n".join(lines).encode())


# ---------------------------------------------------------------------- checkpoints of a run
def toy_checkpointer(folder):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    config = {"config": "SOLVER:\n  BASE_LR: 0.1\n"}
    return Checkpointer(
        model, str(folder), provenance=config, optimizer=optimizer, scheduler=scheduler
    )


def check_resume(attempt, folder, *names):
    checkpointer = toy_checkpointer(folder)
    outcome, rest = attempt(checkpointer.resume, *names)
    if outcome == ACCEPTED and rest is not None:
        assert isinstance(checkpointer.saved_iteration, int)
        assert checkpointer.saved_iteration >= 0
        assert all(value.isfinite().all() for value in checkpointer.model.parameters())
    return outcome


TAG = b"model_0000001.pth"


@fuzz("last_checkpoint", 3000, drawn=mutations(1))
def test_last_checkpoint(attempt, tmp_path, drawn):
    if not (tmp_path / TAG.decode()).exists():
        toy_checkpointer(tmp_path).save("model_0000001", iteration=1)
    content = mutate(TAG, drawn[1])
    (tmp_path / "last_checkpoint").write_bytes(content)
    check_resume(attempt, tmp_path, "last_checkpoint")


ENTRIES = st.sampled_from(["model", "optimizer", "scheduler", "iteration", "clouds"])
STATES = VALUES | st.dictionaries(
    st.sampled_from(["state", "param_groups", "weight", "bias", "last_epoch", "config", "lr"]),
    VALUES | st.sampled_from([torch.ones(1, 2), torch.ones(1), torch.full((1,), torch.nan)]),
)


@fuzz("state of a checkpoint", 3000, entry=ENTRIES, state=STATES)
def test_state_of_a_checkpoint(attempt, tmp_path, entry, state):
    toy_checkpointer(tmp_path).save("model_0000001", iteration=1)
    path = tmp_path / "model_0000001.pth"
    torch.save(torch.load(path, weights_only=True) | {entry: state}, path)
    check_resume(attempt, tmp_path, "model_0000001.pth")


CONFIGS = (b"SOLVER:\n  BASE_LR: 0.1\n  MAX_ITER: 5\nSEED: 3\n", b"")
CFG = get_cfg()


@fuzz("config of a checkpoint", 300, drawn=mutations(len(CONFIGS)), text=st.none() | VALUES)
def test_config_of_a_checkpoint(attempt, tmp_path, drawn, text):
    if text is None:
        text = mutate(CONFIGS[drawn[0]], drawn[1]).decode("latin1")
    outcome, changes = attempt(lambda: changed_keys(text, CFG), "config")
    if outcome == ACCEPTED:
        assert all(isinstance(line, str) for line in changes)


# ---------------------------------------------------------------------- generated images
ENTRY = Entry("0000001.png", "a street", 7, "procedural", "", 24, 32, "0" * 64)
LINE = json.dumps(dataclasses.asdict(ENTRY)).encode() + b"\n"
MANIFESTS = (LINE, LINE + LINE.replace(b"0000001", b"0000002"), LINE[:-20], b"")


def check_manifest(attempt, path):
    outcome, entries = attempt(lambda: read_manifest(path), "manifest.jsonl")
    if outcome == ACCEPTED:
        assert all(e.height >= 1 and e.width >= 1 and e.seed >= 0 for e in entries.values())
        assert not any(name.startswith("/") or ".." in name.split("/") for name in entries)
        added = dataclasses.replace(ENTRY, file="added.png")
        append_entry(path, added)
        assert read_manifest(path) == entries | {"added.png": added}


@fuzz("manifest.jsonl, bytes", 8000, drawn=mutations(len(MANIFESTS)))
def test_manifest_bytes(attempt, tmp_path, drawn):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(mutate(MANIFESTS[drawn[0]], drawn[1]))
    check_manifest(attempt, path)


@fuzz("manifest.jsonl, values", 3000, field=st.sampled_from([*json.loads(LINE), "x"]), value=VALUES)
def test_manifest_values(attempt, tmp_path, field, value):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(json.loads(LINE) | {field: value}) + "\n")
    check_manifest(attempt, path)


RECORDS = (
    b'{"clouds": "0.1", "generator": "procedural", "prompts": ["a street"], "height": 24}',
    b'{"prompts": []}',
)


@fuzz("generation.json", 3000, drawn=mutations(len(RECORDS)))
def test_generation_record(attempt, tmp_path, drawn):
    (tmp_path / "generation.json").write_bytes(mutate(RECORDS[drawn[0]], drawn[1]))
    outcome, record = attempt(lambda: read_record(tmp_path), "generation.json")
    if outcome == ACCEPTED:
        assert all(isinstance(text, str) for text in differences(record, {"prompts": ["a"]}))


KEY = "0" * 32


@fuzz("entry of the SAM cache", 3000, drawn=mutations(1))
def test_sam_cache(attempt, tmp_path, drawn):
    cache = EmbeddingCache(tmp_path, (2, 3, 3))
    values = np.arange(18, dtype=np.float16).reshape(2, 3, 3)
    cache.put(KEY, values)
    path = cache.path(KEY)
    path.write_bytes(mutate(path.read_bytes(), drawn[1]))
    _, found = attempt(lambda: cache.get(KEY), KEY)
    assert found is None or np.array_equal(found, values)
