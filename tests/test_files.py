"""Atomic writes: a file appears complete or not at all."""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from clouds.files import atomic_write, check_regular, file_sha256, final_name, partial_files

ROOT = Path(__file__).resolve().parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_at_the_end_in_a_new_folder(tmp_path):
    path = tmp_path / "a/b/x.bin"
    with atomic_write(path) as file:
        file.write(b"12")
        assert not path.exists()
        (partial,) = names(path.parent)
        assert re.fullmatch(r"\.x\.bin\.[0-9a-f]{32}\.part", partial)
    assert path.read_bytes() == b"12"
    assert names(path.parent) == ["x.bin"]


def test_missing_folder_is_an_error_without_parents(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a/x", parents=False):
        pass
    assert names(tmp_path) == []


def test_text_is_utf8_with_unchanged_line_ends(tmp_path):
    with atomic_write(tmp_path / "x.txt", "w") as file:
        file.write("Bäume\r\n…\n")
    assert (tmp_path / "x.txt").read_bytes() == b"B\xc3\xa4ume\r\n\xe2\x80\xa6\n"


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    with atomic_write(tmp_path / "x"):
        pass
    one, other = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x", "other"))
    assert one == other


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_leaves_the_previous_file(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(tmp_path / "x") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError("full")

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(*{"fsync": (os, "fsync", full), "replace": (Path, "replace", full)}[step])
    with pytest.raises(OSError, match="full"), atomic_write(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_the_first_error_is_raised(tmp_path):
    with pytest.raises(ValueError, match="first"), atomic_write(tmp_path / "x"):
        for path in partial_files(tmp_path):  # so that it cannot be removed again
            path.unlink()
        raise ValueError("first")


def test_content_is_synced_before_the_rename(tmp_path, monkeypatch):
    done = []
    os_fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size) or os_fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda *a: done.append("replace") or replace(*a))
    for fsync in (True, False):
        with atomic_write(tmp_path / "x", fsync=fsync) as file:
            file.write(b"123")
    assert done == [3, "replace", "replace"]


def test_concurrent_writers_of_one_file(tmp_path):
    """All partial files are open at the same time; the result is that of one writer."""
    writers = 8
    together = threading.Barrier(writers)

    def write(number):
        with atomic_write(tmp_path / "x") as file:
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


def test_partial_files_of_a_killed_process_are_listed(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from clouds.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1], 'x.json')) as file:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert final_name(left.name) == "x.json"
    for other in ("x.json", ".hidden.part", "x.part", f".{'a' * 32}.part"):
        (tmp_path / other).write_bytes(b"")
        assert final_name(other) is None
    assert partial_files(tmp_path) == partial_files(tmp_path, "x.json") == [left]
    assert partial_files(tmp_path, "json") == partial_files(tmp_path / "nowhere") == []


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # the first example of FIPS 180-2
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "abc") == expected


def test_only_files_and_folders_pass(tmp_path):
    for path in (Path(__file__), tmp_path, tmp_path / "none", tmp_path / "no\0name"):
        check_regular(path)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    check_regular(tmp_path / "circle")
    for path, kind in (("fifo", "a FIFO"), ("link", "a FIFO"), ("/dev/zero", "a character device")):
        with pytest.raises(ValueError, match=f"{path}: cannot be read, since it is {kind}; "):
            check_regular(tmp_path / path)
