"""Files that appear whole or not at all."""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from clouds.files import name_when_whole, unfinished, written_whole

ROOT = Path(__file__).resolve().parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_at_the_end_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "a/b/x.bin"
    with written_whole(path) as file:
        file.write(b"12")
        assert not path.exists()
        (partial,) = names(path.parent)
        assert re.fullmatch(r"\.x\.bin\.[0-9a-f]{32}\.part", partial)
    assert path.read_bytes() == b"12"
    assert names(path.parent) == ["x.bin"]


def test_a_folder_that_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "a/x", parents=False):
        pass
    assert names(tmp_path) == []


def test_text_is_utf8_with_its_own_lines(tmp_path):
    with written_whole(tmp_path / "x.txt", "w") as file:
        file.write("Bäume\r\n…\n")
    assert (tmp_path / "x.txt").read_bytes() == b"B\xc3\xa4ume\r\n\xe2\x80\xa6\n"


def test_rights_are_those_of_any_new_file(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    with written_whole(tmp_path / "x"):
        pass
    one, other = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x", "other"))
    assert one == other


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_leaves_what_was_there(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(type(error)), written_whole(tmp_path / "x") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError("full")

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(*{"fsync": (os, "fsync", full), "replace": (Path, "replace", full)}[step])
    with pytest.raises(OSError, match="full"), written_whole(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_the_first_error_is_told(tmp_path):
    with pytest.raises(ValueError, match="first"), written_whole(tmp_path / "x"):
        for path in unfinished(tmp_path):  # so that it cannot be removed again
            path.unlink()
        raise ValueError("first")


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda *a: done.append("replace") or replace(*a))
    for synced in (True, False):
        with written_whole(tmp_path / "x", synced=synced) as file:
            file.write(b"123")
    assert done == [3, "replace", "replace"]


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Each holds its file open until all have theirs; one content is there in the end, whole."""
    writers = 8
    together = threading.Barrier(writers)

    def write(number):
        with written_whole(tmp_path / "x") as file:
            file.write(bytes([number]) * 5000)
            together.wait()
            file.write(bytes([number]) * 5000)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "x").read_bytes()
    assert len(content) == 10000 and len(set(content)) == 1
    assert names(tmp_path) == ["x"]


def test_what_a_killed_process_leaves_is_found(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from clouds.files import written_whole\n"
        "with written_whole(Path(sys.argv[1], 'x.json')) as file:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert name_when_whole(left.name) == "x.json"
    for other in ("x.json", ".hidden.part", "x.part", f".{'a' * 32}.part"):
        (tmp_path / other).write_bytes(b"")
        assert name_when_whole(other) is None
    assert unfinished(tmp_path) == unfinished(tmp_path, "x.json") == [left]
    assert unfinished(tmp_path, "json") == unfinished(tmp_path / "nowhere") == []
