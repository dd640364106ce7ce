"""Weights that come with packages: names, hashes, messages where a file is not the right one."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import EntryPoint

import pytest

from clouds import plugins
from clouds.modeling.backbone.open_clip_models import create_clip
from clouds.weights_record import check_record, find_weights, read_record, record_file

COMMAND = "python -m street_models.train_clip"


@pytest.fixture
def weights(tmp_path):
    """A file with its record."""
    file = tmp_path / "small.safetensors"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    record = {"sha256": digest, "command": COMMAND, "seed": 0}
    (tmp_path / "small.record.json").write_text(json.dumps(record))
    return file


def offer(monkeypatch, name, value):
    """An installed package that offers weights."""
    points = {name: EntryPoint(name, value, "clouds.weights")}
    monkeypatch.setattr(plugins, "names", lambda group: sorted(points))
    monkeypatch.setattr(plugins, "load", lambda group, name, kind: value)
    monkeypatch.setattr(plugins, "distribution", lambda group, name: "small-models")


def test_the_recorded_file_passes(weights):
    check_record(weights)
    assert find_weights(str(weights)) == weights
    record = read_record(weights)
    assert record.command == COMMAND and record.details["seed"] == 0


def test_a_file_without_record_passes(tmp_path):
    file = tmp_path / "other.pth"
    file.write_bytes(b"x")
    check_record(file)
    assert find_weights(str(file)) == file


def test_an_altered_file_is_refused_with_both_hashes_and_the_command(weights):
    recorded = hashlib.sha256(b"weights").hexdigest()
    weights.write_bytes(b"weightz")
    with pytest.raises(ValueError) as caught:
        find_weights(str(weights))
    for part in (hashlib.sha256(b"weightz").hexdigest(), recorded, COMMAND, str(weights)):
        assert part in str(caught.value)


def test_a_missing_file_is_named_with_its_hash_and_the_command(weights):
    weights.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        create_clip("street_clip", str(weights))
    assert hashlib.sha256(b"weights").hexdigest() in str(caught.value)
    assert COMMAND in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"sha256": "a"}', '{"sha256": 1, "command": "b"}'])
def test_a_record_that_is_none(weights, text):
    record_file(weights).write_text(text)
    with pytest.raises(
        ValueError, match=r"small\.record\.json is not a record.*sha256 and command"
    ):
        check_record(weights)


def test_a_name_that_a_package_offers(weights, monkeypatch):
    offer(monkeypatch, "small", weights)
    assert find_weights("small") == weights
    assert find_weights("large") is None


def test_a_package_whose_file_is_missing(tmp_path, monkeypatch):
    offer(monkeypatch, "small", tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"'small' of small-models are missing"):
        find_weights("small")


def test_without_the_package_the_name_is_refused_and_the_offered_ones_listed(monkeypatch):
    monkeypatch.setattr(plugins, "names", lambda group: [])
    with pytest.raises(ValueError, match=r"'street_clip'.*nor weights of an installed package"):
        create_clip("street_clip", "street_clip")
