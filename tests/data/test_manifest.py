"""Reading and appending of manifests, also after interruptions."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
from dataclasses import replace

import pytest

from clouds.data.datasets.manifest import Entry, append_entry, read_manifest

FIELDS = ["file", "prompt", "seed", "generator", "model", "height", "width", "sha256"]


def entry(i: int = 0, **other: object) -> Entry:
    values: dict = {
        "file": f"{i:07}.png",
        "prompt": f"a rainy street, Zürich\n\u2028 no. {i}",
        "seed": i,
        "generator": "procedural",
        "model": "",
        "height": 24,
        "width": 32,
        "sha256": hashlib.sha256(str(i).encode()).hexdigest(),
    }
    return Entry(**{**values, **other})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "manifest.jsonl"
    for i in range(3):
        append_entry(path, entry(i))
    return path


def test_round_trip(path):
    assert read_manifest(path) == {f"{i:07}.png": entry(i) for i in range(3)}


def test_one_json_object_per_line(path):
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [list(json.loads(line)) for line in lines] == [FIELDS] * 3
    assert json.loads(lines[1])["prompt"] == "a rainy street, Zürich\n\u2028 no. 1"


def test_redraws_are_in_a_line_only_if_there_were_some(path):
    append_entry(path, entry(3, redraws=2))
    assert list(json.loads(path.read_bytes().splitlines()[3])) == [*FIELDS, "redraws"]
    assert [e.redraws for e in read_manifest(path).values()] == [0, 0, 0, 2]


def test_empty_and_absent(tmp_path):
    (tmp_path / "m.jsonl").write_text("\n \n")
    assert read_manifest(tmp_path / "m.jsonl") == {}
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "none.jsonl")


def test_the_later_of_two_lines_is_used(path):
    later = entry(1, seed=99)
    append_entry(path, later)
    assert read_manifest(path)["0000001.png"] == later
    assert len(read_manifest(path)) == 3


# ------------------------------------------------------------------ incomplete and broken lines


def test_an_incomplete_last_line_of_any_length_is_dropped(path, caplog):
    whole = path.read_bytes()
    start = whole.rfind(b"\n", 0, -1) + 1
    for end in range(start + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        caplog.clear()
        assert list(read_manifest(path)) == ["0000000.png", "0000001.png"]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert f"{path}:3" in caplog.text
    path.write_bytes(whole[:-1])  # complete but for the line break
    caplog.clear()
    assert len(read_manifest(path)) == 3
    assert not caplog.records


@pytest.mark.parametrize("incomplete", [b'{"file": "00', b"\0\0\0", b"\xc3"])
def test_appending_after_an_incomplete_line(path, incomplete):
    with path.open("ab") as file:
        file.write(incomplete)
    append_entry(path, entry(3))
    assert path.read_bytes().count(b"\n") == 4
    assert list(read_manifest(path).values()) == [entry(i) for i in range(4)]


def test_appending_after_a_complete_line_without_line_break(path):
    path.write_bytes(path.read_bytes()[:-1])
    append_entry(path, entry(3))
    assert list(read_manifest(path).values()) == [entry(i) for i in range(4)]


@pytest.mark.parametrize(
    "line,words",
    [
        (b"{", "not JSON"),
        (b'{"file": "a.png"} {', "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "must be a JSON object"),
        (b'{"file": "a.png", "sha": 1}', r"missing: prompt, seed.*sha256; unknown: sha"),
    ],
)
@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_broken_line_is_reported(path, line, words, position):
    lines = path.read_bytes().splitlines()
    lines.insert(position, line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=rf"manifest\.jsonl:{position + 1}: .*{words}"):
        read_manifest(path)


@pytest.mark.parametrize(
    "field,value,words",
    [
        ("file", "", "file is ''"),
        ("file", "/a.png", "below the folder images"),
        ("file", "../a.png", "below the folder images"),
        ("file", "a//b.png", "below the folder images"),
        ("file", 3, "file is 3, but must be a string"),
        ("prompt", None, "prompt is None, but must be a string"),
        ("seed", -1, "seed is -1, but must be at least 0"),
        ("seed", True, "seed is True, but must be an integer"),
        ("seed", "1", "seed is '1', but must be an integer"),
        ("height", 0, "height is 0, but must be at least 1"),
        ("width", 32.0, "width is 32.0, but must be an integer"),
        ("sha256", "A" * 64, "sha256 is 'A+'"),
        ("sha256", "a" * 63, "64 lowercase"),
    ],
)
def test_invalid_values(path, field, value, words):
    with pytest.raises(ValueError, match=words):
        replace(entry(), **{field: value})
    line = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps({**line, field: value}) + "\n")
    with pytest.raises(ValueError, match=rf":4: .*{words}"):
        read_manifest(path)


def test_a_file_in_a_subfolder():
    assert entry(file="part1/a.png").file == "part1/a.png"


# ------------------------------------------------------------------ processes, full disks


def _append_many(path, first):
    for i in range(first, first + 50):
        append_entry(path, entry(i, prompt="x" * 5000))


def test_processes_append_at_the_same_time(tmp_path):
    path = tmp_path / "manifest.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_many, args=(path, 50 * k)) for k in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    entries = read_manifest(path)
    assert sorted(entries) == [f"{i:07}.png" for i in range(200)]
    assert path.read_bytes().count(b"\n") == 200


@pytest.mark.parametrize("fault", ["short", "error"])
def test_a_full_disk_does_not_change_the_manifest(path, monkeypatch, fault):
    before = path.read_bytes()
    write = os.write

    def full(descriptor, data):
        if fault == "error":
            write(descriptor, data[:20])
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:20])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"disk full|No space left"):
        append_entry(path, entry(3))
    assert path.read_bytes() == before


def test_a_line_is_flushed_to_disk_before_append_returns(path, monkeypatch):
    calls = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append("write") or write(fd, data))
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    append_entry(path, entry(3))
    assert calls == ["write", "fsync"]
