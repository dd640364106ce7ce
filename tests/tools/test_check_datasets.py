from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import check_datasets as tool
import numpy as np
import pytest
from dataset_files import EVERY, picture, real_camvid, save, save_palette, write

from clouds.data.dataset_report import check_dataset
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
def test_sound_datasets(tmp_path, capsys, full):
    for name in EVERY:
        for i in range(7):
            write(tmp_path, name, i)
    code, out = run(capsys, tmp_path, "--datasets", *EVERY, *(["--full"] if full else []))
    assert code == 0
    for name in EVERY:
        opened = "7" if full else "5"
        assert cells(out, name) == [name, "ok", "7", "0", "0", "0", opened, "0", "0", "0"]
    assert ("--full opens all" in out) is not full


def test_nothing_is_there(tmp_path, capsys):
    code, out = run(capsys, tmp_path)
    assert code == 0
    for name in EVERY:
        assert cells(out, name) == [name, "missing"]


def test_missing_by_name_is_a_failure_with_a_hint(tmp_path, capsys):
    write(tmp_path, "bdd_val", 0)
    code, out = run(capsys, tmp_path, "--datasets", "bdd_val", "mapillary_val")
    assert code == 1
    assert cells(out, "bdd_val")[1] == "ok"
    assert "mapillary_val: missing" in out
    assert str(tmp_path / "mapillary_vistas/validation/images") in out
    assert "https://www.mapillary.com" in out


def test_halves_without_partner_are_counted(tmp_path, capsys):
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


def test_labels_folder_missing(tmp_path, capsys):
    save(tmp_path / "synthia/RGB/0000000.png", picture(0))
    code, out = run(capsys, tmp_path, "--datasets", "synthia")
    assert code == 1
    assert cells(out, "synthia")[1] == "broken"
    assert f"no folder {tmp_path / 'synthia/GT/LABELS'}" in out


def test_defects_inside_files(tmp_path, capsys):
    for i in range(30):
        write(tmp_path, "mapillary_val", i)
    top = tmp_path / "mapillary_vistas/validation"
    (top / "images/_14Xy-Z.jpg").write_bytes(b"")
    (top / "labels/_15Xy-Z.png").write_text("no picture")
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


def test_a_defect_in_a_dataset_not_asked_for_shows_and_is_no_failure(tmp_path, capsys):
    for i in range(3):
        write(tmp_path, "synthia", i)
    (tmp_path / "synthia/RGB/0000001.png").write_bytes(b"")
    code, out = run(capsys, tmp_path)
    assert code == 0
    assert cells(out, "synthia")[1] == "broken"


def test_gta_pairs_of_two_sizes_are_counted_and_no_failure(tmp_path, capsys):
    for i in range(4):
        write(tmp_path, "gta5", i)
    save_palette(tmp_path / "gta5/labels/00002.png", np.full((25, 32), 7, np.uint8))
    code, out = run(capsys, tmp_path, "--datasets", "gta5", "--full")
    assert code == 0
    assert cells(out, "gta5") == ["gta5", "ok", "3", "0", "0", "1", "3", "0", "0", "0"]


def test_generated_folders_are_found(tmp_path, capsys):
    save(tmp_path / "stable_diffusion/day1/images/a.png", picture(0))
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
    health = check_dataset(
        get_dataset("camvid_val", tmp_path), 3, 2, lambda done, total: seen.append((done, total))
    )
    assert len(health.broken_files) == 2
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_as_a_command(tmp_path):
    write(tmp_path, "gta5", 0)
    command = [sys.executable, str(TOOL), "--root", str(tmp_path), "--datasets", "gta5"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "gta5")[1:3] == ["ok", "1"]


def test_real_camvid(capsys):
    folder = real_camvid()
    names = ["camvid_val", "camvid_train"]
    code, out = run(capsys, folder.parent, "--datasets", *names, "--full")
    assert code == 0
    for name in names:
        count = str(len(list((folder / name.removeprefix("camvid_")).iterdir())))
        assert cells(out, name) == [name, "ok", count, "0", "0", "0", count, "0", "0", "0"]
