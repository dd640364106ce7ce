"""Folders with links in circles, devices, and folders that cannot be read."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from dataset_files import write

from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.datasets.scan import scan_files


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.fixture
def gta5(tmp_path):
    forget_listings()
    write(tmp_path, "gta5", 0)
    write(tmp_path, "gta5", 1)
    return tmp_path / "gta5"


def test_files_in_circles_of_links_are_listed_once_under_their_own_names(tmp_path):
    touch(tmp_path / "a/1.png")
    touch(tmp_path / "b/2.png")
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a")
    (tmp_path / "a/up").symlink_to(tmp_path)
    touch(tmp_path.parent / f"{tmp_path.name}_elsewhere/3.png")
    (tmp_path / "c").symlink_to(tmp_path.parent / f"{tmp_path.name}_elsewhere")
    scan = scan_files(tmp_path, (".png",))
    assert sorted(scan.files) == ["a/1", "b/2", "c/3"]
    assert scan.unusable == []
    assert len(scan.repeated) == 3


def test_a_circle_of_links_is_told_and_changes_no_record(gta5, caplog):
    expected = get_dataset("gta5", gta5.parent).records()
    (gta5 / "images/again").symlink_to(gta5 / "images")
    forget_listings()
    assert get_dataset("gta5", gta5.parent).records() == expected
    assert f"{gta5}/images/again, the same folder as {gta5}/images" in caplog.text


@pytest.mark.parametrize("kind", ["fifo", "device", "dangling", "itself", "dangling folder"])
def test_what_is_no_file_is_named_and_never_opened(gta5, kind):
    path = gta5 / "images/00000.png"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("/nowhere/a.png")
    elif kind == "itself":
        path.symlink_to(path)
    else:
        path = gta5 / "images/day"
        path.symlink_to("/nowhere")
    with pytest.raises(ValueError) as error:
        get_dataset("gta5", gta5.parent).records()
    text = str(error.value)
    reason = {"fifo": "a FIFO", "device": "a character device", "itself": "cannot be looked up"}
    for part in (f"{path} (", reason.get(kind, "/nowhere"), "Only regular files", "remove them"):
        assert part in text


def test_a_folder_that_cannot_be_read_is_named():
    top = Path(tempfile.mkdtemp())
    try:
        top.chmod(0o755)
        touch(top / "a/1.png")
        touch(top / "b/2.png")
        (top / "b").chmod(0)
        user = os.geteuid()
        if user == 0:  # root reads every folder
            os.seteuid(65534)
        try:
            scan = scan_files(top, (".png",))
        finally:
            os.seteuid(user)
        assert sorted(scan.files) == ["a/1"]
        assert scan.unusable == [f"{top}/b (a folder that cannot be read: Permission denied)"]
    finally:
        (top / "b").chmod(0o755)
        shutil.rmtree(top)
