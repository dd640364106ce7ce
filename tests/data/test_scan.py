"""Folders as they are on disks: links in circles, devices, other endings, foreign files."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from dataset_files import write

from clouds.data.datasets import dataset_names, forget_listings, get_dataset
from clouds.data.datasets.builtin import builtin_datasets
from clouds.data.datasets.description import DatasetDescription, Folders
from clouds.data.datasets.listing import list_dataset
from clouds.data.datasets.scan import files_beside, same_files, scan_files
from clouds.data.structures import Domain


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


def names(scan, top):
    """Key -> name of the file, relative to the folder."""
    return {key: str(Path(file.path).relative_to(top)) for key, file in scan.files.items()}


def test_endings_are_compared_without_case(tmp_path):
    for name in ("1_leftImg8bit.PNG", "2_LEFTIMG8BIT.png", "a/3_leftImg8bit.Png", "4.png"):
        touch(tmp_path / name)
    touch(tmp_path / "5_leftImg8bit.png.txt")
    scan = scan_files(tmp_path, ("_leftImg8bit.png",))
    assert names(scan, tmp_path) == {
        "1": "1_leftImg8bit.PNG",
        "2": "2_LEFTIMG8BIT.png",
        "a/3": "a/3_leftImg8bit.Png",
    }
    assert scan.unused == [f"{tmp_path}/4.png", f"{tmp_path}/5_leftImg8bit.png.txt"]


def test_of_two_files_with_a_key_the_first_suffix_in_its_own_case_is_used(tmp_path):
    for name in ("1.jpg", "1.PNG", "1.png", "2.JPG", "2.pnG", "2.PNg", "3.Jpg", "3.jpG"):
        touch(tmp_path / name)
    scan = scan_files(tmp_path, (".png", ".jpg"))
    assert names(scan, tmp_path) == {"1": "1.png", "2": "2.PNg", "3": "3.Jpg"}
    others = {key: {Path(f.path).name for f in files} for key, files in scan.others.items()}
    assert others == {"1": {"1.jpg", "1.PNG"}, "2": {"2.JPG", "2.pnG"}, "3": {"3.jpG"}}
    assert scan.unused == []


def test_hidden_files_and_files_of_other_programs_are_no_data(tmp_path):
    junk = {".ipynb_checkpoints": 1, "@eaDir": 2, "__MACOSX": 1, "$RECYCLE.BIN": 1, "lost+found": 0}
    for folder, count in junk.items():
        (tmp_path / folder).mkdir()
        for i in range(count):
            touch(tmp_path / folder / f"deep/{i}.png")
    touch(tmp_path / "a/1.png")
    (tmp_path / ".link").symlink_to(tmp_path / "a")
    touch(tmp_path / "._1.png")
    scan = scan_files(tmp_path, (".png",))
    assert list(scan.files) == ["a/1"]
    assert scan.unused == [f"{tmp_path}/._1.png"]
    assert {(Path(f.path).name, f.num_files) for f in scan.unused_folders} == {
        *junk.items(),
        (".link", 1),
    }
    assert not scan.unusable and not scan.repeated


def test_the_folder_itself_may_be_hidden(tmp_path):
    touch(tmp_path / ".cache/@eaDir/1.png")
    assert list(scan_files(tmp_path / ".cache/@eaDir", (".png",)).files) == ["1"]


def test_foreign_folders_are_no_generated_datasets(tmp_path):
    for folder in ("day", ".ipynb_checkpoints", "@eaDir", "lost+found"):
        touch(tmp_path / f"stable_diffusion/{folder}/images/1.png")
    assert [name for name in dataset_names(tmp_path) if name.startswith("sd_")] == ["sd_day"]


def test_two_names_of_one_file(tmp_path):
    touch(tmp_path / "1.png")
    os.link(tmp_path / "1.png", tmp_path / "2.png")
    (tmp_path / "3.png").symlink_to("1.png")
    touch(tmp_path / "4.png")
    scan = scan_files(tmp_path, (".png",))
    assert same_files((f.path, f.identity) for f in scan.files.values()) == (
        f"{tmp_path}/2.png, the same file as {tmp_path}/1.png",
        f"{tmp_path}/3.png, the same file as {tmp_path}/1.png",
    )


def test_an_inode_that_is_not_unique_is_no_proof(tmp_path):
    files = [str(touch(tmp_path / name)) for name in ("1.png", "2.png")]
    assert same_files((file, (1, 2)) for file in files) == ()


def test_files_beside_others(tmp_path):
    files = [touch(tmp_path / name) for name in ("a/1.png", "b/2.png", "a/3.png", "a/deep/4.png")]
    (tmp_path / "b/link").symlink_to("/nowhere")
    beside = files_beside([str(files[0]), str(files[1]), "/nowhere/5.png"])
    assert beside == (f"{tmp_path}/a/3.png", f"{tmp_path}/b/link")


# ---------------------------------------------------------------------- what training is told


def test_files_in_capitals_are_pairs(gta5):
    (gta5 / "images/00000.png").rename(gta5 / "images/00000.PNG")
    (gta5 / "labels/00001.png").rename(gta5 / "labels/00001.Png")
    records = get_dataset("gta5", gta5.parent).records()
    assert [(r.image.name, r.label.name) for r in records] == [
        ("00000.PNG", "00000.png"),
        ("00001.png", "00001.Png"),
    ]


def test_training_is_told_of_second_files(gta5, caplog):
    for name in ("images/00000.PNG", "labels/00001.PNG"):
        shutil.copy((gta5 / name).with_suffix(".png"), gta5 / name)
    records = get_dataset("gta5", gta5.parent).records()
    assert {path.suffix for r in records for path in (r.image, r.label)} == {".png"}
    (message,) = [r.message for r in caplog.records]
    assert "gta5: 2 files have the name of another one" in message
    for name in ("images/00000", "labels/00001"):
        assert f"{gta5}/{name}.png, not {gta5}/{name}.PNG" in message


def test_a_label_in_a_second_format_is_no_second_file(gta5, caplog):
    converted = gta5 / "labels/00000_labelTrainIds.png"
    shutil.copy(gta5 / "labels/00000.png", converted)
    listing = get_dataset("gta5", gta5.parent).listing()
    assert listing.records[0].label == converted
    assert listing.second_files == () and caplog.text == ""
    assert listing.unused == (f"{gta5}/labels/00000.png",)


def test_training_is_told_of_an_image_under_two_names(gta5, caplog):
    os.link(gta5 / "images/00000.png", gta5 / "images/00002.png")
    os.link(gta5 / "labels/00000.png", gta5 / "labels/00002.png")
    assert len(get_dataset("gta5", gta5.parent).records()) == 3
    (message,) = [r.message for r in caplog.records]
    assert "gta5: 1 images are listed twice" in message
    assert f"{gta5}/images/00002.png, the same file as {gta5}/images/00000.png" in message


def test_other_images_in_the_folder_are_named(gta5, caplog):
    touch(gta5 / "images/a.jpeg")
    touch(gta5 / "images/.hidden.jpeg")
    touch(gta5 / "labels/b.txt")
    with caplog.at_level(logging.INFO):
        get_dataset("gta5", gta5.parent).records()
    text = f"1 files in the folder of images are not used: {gta5}/images/a.jpeg"
    assert text in caplog.text
    for path in (gta5 / "images").glob("*.png"):
        path.rename(path.with_suffix(".jpg"))
    shutil.rmtree(gta5 / "labels")
    (gta5 / "labels").mkdir()
    with pytest.raises(ValueError, match="no usable image") as error:
        get_dataset("gta5", gta5.parent).records()
    assert f"{gta5}/images/00000.jpg" in str(error.value)


def test_images_and_labels_in_one_folder(tmp_path):
    """Files of either kind are no unused files of the other."""
    for name in ("a.jpg", "a_mask.png", "b.jpg", "b_mask.png", "c.txt"):
        touch(tmp_path / "all" / name)
    train_ids = builtin_datasets()["bdd_val"].label_formats[0]
    description = DatasetDescription(
        name="mine",
        domain=Domain.SOURCE,
        folders=(Folders("all", "all"),),
        image_suffixes=(".jpg",),
        label_formats=(replace(train_ids, suffix="_mask.png"),),
        how_to_get="",
    )
    listing = list_dataset(description, tmp_path)
    assert [(r.image.name, r.label.name) for r in listing.records] == [
        ("a.jpg", "a_mask.png"),
        ("b.jpg", "b_mask.png"),
    ]
    assert listing.unused == (f"{tmp_path}/all/c.txt",)


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
