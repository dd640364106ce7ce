"""The tool that reports on the datasets under a root."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from dataset_files import (
    DATASET_NAMES,
    random_image,
    real_camvid,
    save,
    save_palette,
    write,
    write_generated,
)
from PIL import Image

from clouds.cli import check_data as tool
from clouds.d2 import DatasetCatalog, MetadataCatalog
from clouds.data.dataset_report import UNREADABLE, check_dataset
from clouds.data.datasets import forget_listings, get_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools/check_datasets.py"


@pytest.fixture(autouse=True)
def fresh():
    forget_listings()


def cells(out: str, name: str) -> list[str]:
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
    return line.split()


def run(capsys, root, *args) -> tuple[int, str]:
    code = tool.main(["--root", str(root), *args])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("full", [True, False])
def test_valid_datasets(tmp_path, capsys, full):
    for name in DATASET_NAMES:
        for i in range(7):
            write(tmp_path, name, i)
    code, out = run(capsys, tmp_path, "--datasets", *DATASET_NAMES, *(["--full"] if full else []))
    assert code == 0
    for name in DATASET_NAMES:
        opened = "7" if full else "5"
        assert cells(out, name)[:10] == [name, "ok", "7", "0", "0", "0", opened, "0", "0", "0"]
    assert ("--full opens all" in out) is not full


def test_no_dataset_exists(tmp_path, capsys):
    code, out = run(capsys, tmp_path)
    assert code == 0
    for name in DATASET_NAMES:
        assert cells(out, name) == [name, "missing"]


def test_a_requested_dataset_that_is_missing_fails_with_a_hint(tmp_path, capsys):
    write(tmp_path, "bdd_val", 0)
    code, out = run(capsys, tmp_path, "--datasets", "bdd_val", "mapillary_val")
    assert code == 1
    assert cells(out, "bdd_val")[1] == "ok"
    assert "mapillary_val: missing" in out
    assert str(tmp_path / "mapillary_vistas/validation/images") in out
    assert "https://www.mapillary.com" in out


def test_files_without_partner_are_counted(tmp_path, capsys):
    for i in range(6):
        image, _ = write(tmp_path, "cityscapes_val", i)
        if i < 2:
            image.unlink()
    for label in tmp_path.rglob("*000005_000019_gtFine_labelIds.png"):
        label.unlink()
    code, out = run(capsys, tmp_path, "--datasets", "cityscapes_val")
    assert code == 1
    assert cells(out, "cityscapes_val")[1:6] == ["broken", "3", "1", "2", "0"]
    assert "000005_000019_leftImg8bit.png" in out
    assert "000001_000019_gtFine_labelIds.png" in out


def test_missing_labels_folder(tmp_path, capsys):
    save(tmp_path / "synthia/RGB/0000000.png", random_image(0))
    code, out = run(capsys, tmp_path, "--datasets", "synthia")
    assert code == 1
    assert cells(out, "synthia")[1] == "broken"
    assert f"no folder {tmp_path / 'synthia/GT/LABELS'}" in out


def test_defects_inside_files(tmp_path, capsys):
    for i in range(30):
        write(tmp_path, "mapillary_val", i)
    top = tmp_path / "mapillary_vistas/validation"
    (top / "images/_14Xy-Z.jpg").write_bytes(b"")
    (top / "labels/_15Xy-Z.png").write_text("not an image")
    save_palette(top / "labels/_16Xy-Z.png", np.full((24, 32), 66, np.uint8))
    save_palette(top / "labels/_17Xy-Z.png", np.full((24, 30), 0, np.uint8))
    code, out = run(capsys, tmp_path, "--datasets", "mapillary_val", "--full", "--workers", "3")
    assert code == 1
    row = ["mapillary_val", "broken", "30", "0", "0", "0", "30", "2", "1", "1"]
    assert cells(out, "mapillary_val")[:10] == row
    assert "_14Xy-Z.jpg" in out
    assert "_15Xy-Z.png: cannot be read" in out
    assert "_16Xy-Z.png (ids 66)" in out
    assert "_17Xy-Z.png (30x24, image 32x24)" in out


def test_a_jpeg_that_a_decoder_warns_of(tmp_path, capsys):
    for i in range(6):
        write(tmp_path, "mapillary_val", i)
    path = tmp_path / "mapillary_vistas/validation/images/_3Xy-Z.jpg"
    Image.fromarray(random_image(0)).save(path, quality=95)
    data = bytearray(path.read_bytes())
    data[-600:-300] = bytes(300)
    path.write_bytes(data)
    code, out = run(capsys, tmp_path, "--datasets", "mapillary_val", "--full")
    assert code == 1
    assert cells(out, "mapillary_val")[1] == "broken"
    assert "1 JPEG files have damaged data: " in out
    assert "_3Xy-Z.jpg: its JPEG data is damaged (Corrupt JPEG data" in out


def test_a_defect_in_a_dataset_that_was_not_requested_is_shown_without_failing(tmp_path, capsys):
    for i in range(3):
        write(tmp_path, "synthia", i)
    (tmp_path / "synthia/RGB/0000001.png").write_bytes(b"")
    code, out = run(capsys, tmp_path)
    assert code == 0
    assert cells(out, "synthia")[1] == "broken"


def test_gta_pairs_of_different_size_are_counted_without_failing(tmp_path, capsys):
    for i in range(4):
        write(tmp_path, "gta5", i)
    save_palette(tmp_path / "gta5/labels/00002.png", np.full((25, 32), 7, np.uint8))
    code, out = run(capsys, tmp_path, "--datasets", "gta5", "--full")
    assert code == 0
    assert cells(out, "gta5")[:10] == ["gta5", "ok", "3", "0", "0", "1", "3", "0", "0", "0"]


def test_generated_folders_are_found(tmp_path, capsys):
    save(tmp_path / "stable_diffusion/day1/images/a.png", random_image(0))
    code, out = run(capsys, tmp_path)
    assert code == 0
    assert cells(out, "sd_day1")[:3] == ["sd_day1", "ok", "1"]


def test_corrupted_datasets_are_checked_when_they_are_named(tmp_path, capsys, monkeypatch):
    write(tmp_path, "cityscapes_val", 0)
    monkeypatch.setitem(sys.modules, "imagecorruptions", types.ModuleType("imagecorruptions"))
    code, out = run(capsys, tmp_path)
    assert code == 0 and "cityscapes_c_" not in out
    code, out = run(capsys, tmp_path, "--datasets", "cityscapes_c_fog_3")
    assert code == 0
    assert cells(out, "cityscapes_c_fog_3")[1:3] == ["ok", "1"]
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)  # as if it was not installed
    code, out = run(capsys, tmp_path, "--datasets", "cityscapes_c_fog_3")
    assert code == 1
    assert cells(out, "cityscapes_c_fog_3")[1] == "broken"
    assert "pip install --no-deps imagecorruptions-imaug" in out
    code, out = run(capsys, tmp_path, "--datasets", "cityscapes_c_rain_3")
    assert code == 1 and "corruption one of gaussian_noise, shot_noise" in out


def test_unknown_name_and_missing_root(tmp_path, capsys):
    code, out = run(capsys, tmp_path, "--datasets", "gta")
    assert code == 1
    assert "unknown dataset 'gta'" in out
    code, out = run(capsys, tmp_path / "nowhere")
    assert code == 1
    assert "DETECTRON2_DATASETS" in out


def test_the_sample_is_spread_from_first_to_last(tmp_path):
    for i in range(40):
        write(tmp_path, "camvid_val", i)
    for path in ("0001TP_000000.png", "0001TP_000039.png"):
        (tmp_path / "camvid/val" / path).write_bytes(b"")
    seen = []
    report = check_dataset(
        get_dataset("camvid_val", tmp_path), 3, 2, lambda done, total: seen.append((done, total))
    )
    assert len(report.defects[UNREADABLE]) == 2
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_from_the_command_line(tmp_path):
    write(tmp_path, "gta5", 0)
    (tmp_path / "gta5/images" / os.fsdecode(b"\xff.txt")).touch()
    command = [sys.executable, str(TOOL), "--root", str(tmp_path), "--datasets", "gta5"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "1 *.txt, such as" in done.stdout and "/\\udcff.txt" in done.stdout
    assert cells(done.stdout, "gta5")[1:3] == ["ok", "1"]


# ---------------------------------------------------------------- files that are not used


def test_files_that_are_not_used(tmp_path, capsys):
    for i in range(3):
        write(tmp_path, "bdd_val", i)
    images = tmp_path / "bdd100k/images/10k/val"
    labels = tmp_path / "bdd100k/labels/sem_seg/masks/val"
    for path in (images / "Thumbs.db", images / "a.jpeg", images / "b.JPEG", labels / "list"):
        path.touch()
    (labels / ".DS_Store").touch()
    for name in ("@eaDir/0000-abc.jpg", "@eaDir/deep/1.png", ".thumbnails/0000-abc.jpg"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).touch()
    code, out = run(capsys, tmp_path, "--datasets", "bdd_val")
    assert code == 0
    assert cells(out, "bdd_val")[:4] == ["bdd_val", "ok", "3", "0"]
    assert cells(out, "bdd_val")[10] == "8"  # 5 and the 3 in the two folders
    line = next(line for line in out.splitlines() if "5 files are not used" in line)
    for part in (f"2 *.jpeg, such as {images}/a.jpeg", f"1 *.db, such as {images}/Thumbs.db"):
        assert part in line
    for part in (f"1 hidden, such as {labels}/.DS_Store", f"1 *, such as {labels}/list"):
        assert part in line
    line = next(line for line in out.splitlines() if "2 folders are not used" in line)
    assert f"{images}/@eaDir (2 files)" in line and f"{images}/.thumbnails (1 files)" in line


def test_files_of_cityscapes_that_are_not_used(tmp_path, capsys):
    for i in range(4):
        write(tmp_path, "cityscapes_val", i)
    _, out = run(capsys, tmp_path, "--datasets", "cityscapes_val")
    assert cells(out, "cityscapes_val")[10] == "12"  # colors, instances, polygons
    assert "8 *.png, such as" in out and "4 *.json, such as" in out


def test_second_files_and_files_listed_twice_are_told(tmp_path, capsys):
    for i in range(3):
        write(tmp_path, "mapillary_val", i)
    top = tmp_path / "mapillary_vistas/validation"
    (top / "images/_0Xy-Z.JPG").write_bytes((top / "images/_0Xy-Z.jpg").read_bytes())
    for folder, ending in (("images", "jpg"), ("labels", "png")):
        os.link(top / f"{folder}/_1Xy-Z.{ending}", top / f"{folder}/again.{ending}")
    code, out = run(capsys, tmp_path, "--datasets", "mapillary_val", "--full")
    assert code == 0
    assert cells(out, "mapillary_val")[:3] == ["mapillary_val", "ok", "4"]
    assert cells(out, "mapillary_val")[10] == "1"
    assert f"{top}/images/_0Xy-Z.jpg, not {top}/images/_0Xy-Z.JPG" in out
    for what, file in (("images", "images/again.jpg"), ("labels", "labels/again.png")):
        one = file.replace("again", "_1Xy-Z")
        assert f"1 {what} are listed twice, by links" in out
        assert f"{top}/{file}, the same file as {top}/{one}" in out


def test_a_registered_dataset(tmp_path, capsys):
    samples = []
    for i in range(3):
        image = save(tmp_path / f"images/{i}.png", random_image(i))
        label = np.full((24, 32), 255, np.uint8)
        label[:6] = i % 2  # a quarter of the pixels
        label = save(tmp_path / f"labels/{i}.png", label)
        samples.append({"file_name": str(image), "sem_seg_file_name": str(label)})
    (tmp_path / "images/other.jpg").touch()
    (tmp_path / "images/3.png").symlink_to(tmp_path / "images/2.png")
    samples.append(samples[2] | {"file_name": str(tmp_path / "images/3.png")})
    (tmp_path / "labels/deep").mkdir()
    (tmp_path / "labels/deep/1.png").touch()  # not beside the files
    DatasetCatalog.register("h_mine", lambda: samples)
    try:
        MetadataCatalog.get("h_mine").set(stuff_classes=["road", "goat", "boat"])
        code, out = run(capsys, tmp_path, "--datasets", "h_mine", "--classes")
    finally:
        DatasetCatalog.remove("h_mine")
        MetadataCatalog.remove("h_mine")
    assert code == 0
    assert cells(out, "h_mine") == ["h_mine", "ok", "4", *"000", "4", *"000", "1", "25.0%"]
    assert f"1 files are not used: 1 *.jpg, such as {tmp_path}/images/other.jpg" in out
    assert f"{tmp_path}/images/3.png, the same file as {tmp_path}/images/2.png" in out
    assert cells(out, "road") == ["road", "75.000", "75.0"]
    assert cells(out, "goat") == ["goat", "25.000", "25.0"]
    assert cells(out, "boat") == ["boat", "0.000", "0.0"]


# ---------------------------------------------------------------- classes in the labels


def test_shares_of_classes(tmp_path, capsys):
    # road, sky and ignored pixels in 4 labels of 100 pixels: 120, 40 and 240
    for i, (road, sky) in enumerate([(60, 0), (60, 0), (0, 40), (0, 0)]):
        save(tmp_path / f"gta5/images/{i}.png", random_image(i, (10, 10)))
        ids = np.repeat([7, 23, 4], [road, sky, 100 - road - sky]).astype(np.uint8)
        save_palette(tmp_path / f"gta5/labels/{i}.png", ids.reshape(10, 10))
    code, out = run(capsys, tmp_path, "--datasets", "gta5", "--full", "--classes")
    assert code == 0
    assert cells(out, "gta5")[10:] == ["0", "40.0%"]
    assert "1 of 4 opened labels have ignored pixels only" in out
    assert f"{tmp_path}/gta5/labels/3.png" in out
    assert cells(out, "road") == ["road", "75.000", "50.0"]
    assert cells(out, "sky") == ["sky", "25.000", "25.0"]
    assert cells(out, "car") == ["car", "0.000", "0.0"]
    _, out = run(capsys, tmp_path, "--datasets", "gta5", "--full")
    assert "% of images" not in out


def test_shares_of_a_generated_dataset(tmp_path, capsys):
    for i in range(4):
        write_generated(tmp_path, f"{i}.png")
    for i in range(2):
        save(tmp_path / f"stable_diffusion/x/labels/{i}.png", np.full((24, 32), 10 + i, np.uint8))
    code, out = run(capsys, tmp_path, "--datasets", "sd_x", "--classes")
    assert code == 0
    assert cells(out, "sd_x")[10:] == ["0", "100.0%"]
    assert cells(out, "sky") == ["sky", "50.000", "50.0"]


@pytest.mark.parametrize("full", [True, False])
def test_labels_without_a_class(tmp_path, capsys, full):
    for i in range(8):
        write(tmp_path, "gta5", i)
        save_palette(tmp_path / f"gta5/labels/{i:05}.png", np.full((24, 32), 3, np.uint8))
    code, out = run(capsys, tmp_path, "--datasets", "gta5", *["--full"] * full)
    assert cells(out, "gta5")[11] == "0.0%"
    if full:
        assert code == 1 and "- all 8 labels have ignored pixels only" in out
    else:  # the others may have classes
        assert code == 0 and "* 5 of 5 opened labels have ignored pixels only" in out


# ---------------------------------------------------------------- generated images


@pytest.fixture
def root(tmp_path):
    """Four generated images, numbers 100 to 103."""
    for i in range(4):
        write_generated(tmp_path, f"{100 + i}.png")
    return tmp_path


@pytest.fixture
def images(root):
    return root / "stable_diffusion/x/images"


def test_valid_generated_datasets(root, capsys):
    write_generated(root, "1.png", folder="y")
    code, out = run(capsys, root, "--full")
    assert code == 0
    assert cells(out, "sd_x") == ["sd_x", "ok", "4", "4", *"004000", "0", "-"]
    assert cells(out, "sd_y")[:3] == ["sd_y", "ok", "1"]


@pytest.mark.parametrize("full", [True, False])
def test_a_generated_dataset_with_every_defect(root, images, capsys, full):
    for i in range(4, 7):
        write_generated(root, f"{100 + i}.png")
    save(images / "200.png", random_image(0))
    (images / "100.png").unlink()
    (images / "101.png").write_bytes(b"")
    save(images / "102.png", random_image(102, (20, 32)))
    save(images / "103.png", random_image(0))  # the same size, other contents
    code, out = run(capsys, root, "--datasets", "sd_x", "--workers", "2", *["--full"] * full)
    assert code == 1
    assert cells(out, "sd_x")[1] == "broken"
    assert f"1 images have no entry in {images.parent / 'manifest.jsonl'}" in out
    assert str(images / "200.png") in out
    assert f"missing in {images}: 100.png" in out
    if full:
        assert cells(out, "sd_x")[7] == "1"
        assert "2 images differ from the manifest" in out
        assert f"{images / '102.png'} (32x20, manifest 32x24)" in out
        assert f"{images / '103.png'} (other contents than when it was generated)" in out
    else:
        assert "other contents" not in out


def test_hashes_are_compared_when_all_images_are_opened(root, images):
    path = images / "103.png"
    path.write_bytes(path.read_bytes() + b"\0")  # still an image with the same pixels
    dataset = get_dataset("sd_x", root)
    assert check_dataset(dataset, 4, 1).state == "ok"
    assert check_dataset(dataset, None, 1).problems() == [
        f"1 images differ from the manifest: {path} (other contents than when it was generated)"
    ]


def test_a_broken_manifest_is_reported(root, images, capsys):
    with (images.parent / "manifest.jsonl").open("a") as file:
        file.write("{}\n")
    code, out = run(capsys, root, "--datasets", "sd_x")
    assert code == 1
    assert "manifest.jsonl:5: not a valid manifest entry" in out


def test_without_a_manifest_nothing_is_compared(root, images, capsys):
    (images.parent / "manifest.jsonl").unlink()
    code, out = run(capsys, root, "--datasets", "sd_x", "--full")
    assert code == 0
    assert cells(out, "sd_x")[1] == "ok"


# ---------------------------------------------------------------- real images


def test_real_camvid(capsys):
    folder = real_camvid()
    names = ["camvid_val", "camvid_train"]
    code, out = run(capsys, folder.parent, "--datasets", *names, "--full")
    assert code == 0
    for name in names:
        count = str(len(list((folder / name.removeprefix("camvid_")).iterdir())))
        assert cells(out, name)[:11] == [name, "ok", count, *"000", count, *"000", "0"]


def test_generated_images_of_one_color(tmp_path, capsys):
    top = tmp_path / "stable_diffusion/y/images"
    for name, color in (("black", 0), ("white", 255)):
        save(top / f"{name}.png", np.full((24, 32, 3), color, np.uint8))
    save(top / "usual.png", random_image(0))
    code, out = run(capsys, tmp_path, "--datasets", "sd_y", "--full")
    assert code == 1
    assert cells(out, "sd_y")[1] == "broken"
    assert "2 generated images have only one color: " in out
    assert f"{top}/black.png ((0, 0, 0) in RGB), {top}/white.png ((255, 255, 255) in RGB)" in out
    # a dark image of a camera is no defect
    write(tmp_path, "gta5", 0)
    save(tmp_path / "gta5/images/00000.png", np.zeros((24, 32, 3), np.uint8))
    assert run(capsys, tmp_path, "--datasets", "gta5", "--full")[0] == 0


def test_described_datasets(tmp_path, capsys, monkeypatch):
    """They are checked without a dataset root."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    text = "name: mine\nimages: i\nlabels: l\nclasses: [{name: road, ids: 4}]\nignore_ids: 7\n"
    (tmp_path / "mine.yaml").write_text(text)
    save(tmp_path / "i/a.png", random_image(0))
    save(tmp_path / "l/a.png", np.full((24, 32), 4, np.uint8))
    argv = ["--descriptions", str(tmp_path / "mine.yaml"), "--full", "--classes"]
    assert tool.main(argv) == 0
    out = capsys.readouterr().out
    assert cells(out, "mine")[:3] == ["mine", "ok", "1"] and "Dataset root" not in out
    assert cells(out, "road")[:1] == ["road"]
    save(tmp_path / "l/a.png", np.full((24, 32), 5, np.uint8))
    assert tool.main(argv) == 1
    assert "(ids 5)" in capsys.readouterr().out
    assert tool.main([*argv, "--datasets", "mine", "gta5"]) == 1
    assert "This folder does not exist" in capsys.readouterr().err
