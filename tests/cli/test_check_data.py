"""The tool that reports on the datasets under a root."""

from __future__ import annotations

import subprocess
import sys
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
        assert cells(out, name) == [name, "ok", "7", "0", "0", "0", opened, "0", "0", "0"]
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
    assert cells(out, "mapillary_val") == row
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
    assert cells(out, "gta5") == ["gta5", "ok", "3", "0", "0", "1", "3", "0", "0", "0"]


def test_generated_folders_are_found(tmp_path, capsys):
    save(tmp_path / "stable_diffusion/day1/images/a.png", random_image(0))
    code, out = run(capsys, tmp_path)
    assert code == 0
    assert cells(out, "sd_day1")[:3] == ["sd_day1", "ok", "1"]


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
    command = [sys.executable, str(TOOL), "--root", str(tmp_path), "--datasets", "gta5"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "gta5")[1:3] == ["ok", "1"]


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
    assert cells(out, "sd_x") == ["sd_x", "ok", "4", "4", "0", "0", "4", "0", "0", "0"]
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
        assert cells(out, name) == [name, "ok", count, "0", "0", "0", count, "0", "0", "0"]


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
