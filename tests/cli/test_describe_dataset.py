"""The command that drafts a description."""

from __future__ import annotations

import numpy as np
import pytest
from dataset_files import random_image, save
from PIL import Image

from clouds.cli import describe_dataset


@pytest.fixture
def campus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = np.full((40, 60, 3), 200, np.uint8)
    label = np.zeros((40, 60), np.uint8)
    label[:, 30:] = 5
    save(tmp_path / "my campus/images/a.png", image)
    save(tmp_path / "my campus/labels/a.png", label)
    return tmp_path / "my campus"


def test_two_files_are_written(campus, tmp_path, capsys):
    describe_dataset.main([str(campus / "images"), str(campus / "labels")])
    out = capsys.readouterr().out
    assert "1 pairs; without partner: 0 images, 0 labels" in out
    assert "5  50 % of the pixels, in 100 % of images" in out
    assert "check-data --descriptions my_campus.yaml --full" in out
    text = (tmp_path / "my_campus.yaml").read_text()
    assert 'images: "my campus/images"' in text and "{name: '', ids: [5]}" in text
    sheet = np.asarray(Image.open(tmp_path / "my_campus_ids.png"))
    # two tiles of 320 pixels: the left half of one, the right half of the other is bright
    assert sheet.shape[1] == 2 * (320 + 12) + 12
    row = sheet[sheet.shape[0] // 2 + 20, :, 0].astype(int)
    bright = [row[12 + tile * 332 + side] for tile in (0, 1) for side in (80, 240)]
    assert bright == [200, 50, 50, 200]


def test_existing_files_are_kept(campus, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("mine")
    args = [str(campus / "images"), str(campus / "labels"), "--output", "x.yaml"]
    with pytest.raises(SystemExit, match="2"):
        describe_dataset.main(args)
    assert (
        "x.yaml exist already; choose another --output, or --overwrite" in capsys.readouterr().err
    )
    assert (tmp_path / "x.yaml").read_text() == "mine"
    describe_dataset.main([*args, "--overwrite", "--name", "mine"])
    assert "name: mine" in (tmp_path / "x.yaml").read_text()


def test_further_splits(campus, tmp_path):
    folders = [str(campus / "images"), str(campus / "labels")]
    describe_dataset.main([*folders, "--val", "/v/i", "/v/l", "--name", "mine"])
    text = (tmp_path / "mine.yaml").read_text()
    assert '  train: {images: "my campus/images", labels: "my campus/labels"}' in text
    assert "  val: {images: /v/i, labels: /v/l}" in text


def test_a_label_of_another_size(campus, tmp_path, capsys):
    save(campus / "images/a.png", random_image(0, (20, 20)))
    with pytest.raises(SystemExit, match="2"):
        describe_dataset.main([str(campus / "images"), str(campus / "labels")])
    assert "the label is 60x40 pixels, but its image" in capsys.readouterr().err
