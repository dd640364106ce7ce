"""Rendered datasets on disk: file formats, label ids, the record, the command line.

The tables of ids are typed from the datasets' own documentation; files are decoded with Pillow and
OpenCV directly.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from street_renderer import dataset_writer, demo_data, make_demo_data
from street_renderer.dataset_writer import Recipe, render_sample, sample_paths, write_sample

from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.label_space import CITYSCAPES_19

SIZE = (72, 128)

CITYSCAPES = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
SYNTHIA = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 10, 10: 11, 17: 12, 8: 13, 19: 15,
    12: 17, 11: 18,
}  # fmt: skip
VISTAS = {
    13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8, 29: 9,
    27: 10, 19: 11, 20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16, 57: 17, 52: 18,
}  # fmt: skip
TRAIN_IDS = {i: i for i in range(19)}

LAYOUTS = {
    "gta5": (r"gta5/images/\d{5}\.png", r"gta5/labels/\d{5}\.png", CITYSCAPES),
    "synthia": (r"synthia/RGB/\d{7}\.png", r"synthia/GT/LABELS/\d{7}\.png", SYNTHIA),
    "cityscapes_train": (
        r"cityscapes/leftImg8bit/train/(\w+)/\1_\d{6}_\d{6}_leftImg8bit\.png",
        r"cityscapes/gtFine/train/(\w+)/\1_\d{6}_\d{6}_gtFine_labelIds\.png",
        CITYSCAPES,
    ),
    "cityscapes_val": (
        r"cityscapes/leftImg8bit/val/(\w+)/\1_\d{6}_\d{6}_leftImg8bit\.png",
        r"cityscapes/gtFine/val/(\w+)/\1_\d{6}_\d{6}_gtFine_labelIds\.png",
        CITYSCAPES,
    ),
    "bdd_val": (
        r"bdd100k/images/10k/val/[0-9a-f]{8}-[0-9a-f]{8}\.jpg",
        r"bdd100k/labels/sem_seg/masks/val/[0-9a-f]{8}-[0-9a-f]{8}\.png",
        TRAIN_IDS,
    ),
    "mapillary_val": (
        r"mapillary_vistas/validation/images/\w{22}\.jpg",
        r"mapillary_vistas/validation/labels/\w{22}\.png",
        VISTAS,
    ),
    "acdc_night_val": (
        r"acdc/rgb_anon/night/val/(GOPR\d{4})/\1_frame_\d{6}_rgb_anon\.png",
        r"acdc/gt/night/val/(GOPR\d{4})/\1_frame_\d{6}_gt_labelIds\.png",
        CITYSCAPES,
    ),
}


@pytest.fixture(autouse=True)
def fresh():
    forget_listings()


def write(root: Path, name: str, count: int = 2, size=SIZE) -> list[tuple[Path, Path]]:
    pairs = [sample_paths(root, name, n) for n in range(count)]
    for n, (image, label) in enumerate(pairs):
        write_sample(Recipe.of(name, 3, size), n, image, label)
    return pairs


def decoded(raw: np.ndarray, table: dict[int, int]) -> np.ndarray:
    train_ids = np.full(raw.shape, 255)
    for raw_id, train_id in table.items():
        train_ids[raw == raw_id] = train_id
    return train_ids


def kind_of(name: str) -> str:
    return name.removesuffix("_train").removesuffix("_val")


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_have_the_real_names_and_ids(tmp_path, name):
    image_pattern, label_pattern, table = LAYOUTS[name]
    for n, (image, label) in enumerate(write(tmp_path, name, count=3)):
        assert re.fullmatch(image_pattern, image.relative_to(tmp_path).as_posix())
        assert re.fullmatch(label_pattern, label.relative_to(tmp_path).as_posix())
        rendered = render_sample(Recipe.of(name, 3, SIZE), n)
        raw = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
        if name == "synthia":  # OpenCV's order is blue, green, red
            raw = raw[..., 2]
        else:
            with Image.open(label) as stored:
                raw = np.array(stored) if stored.mode == "P" else raw
        assert raw.ndim == 2
        known = {*table, 0} if table is not TRAIN_IDS else {*table, 255}
        assert set(np.unique(raw)) <= (known if table is not VISTAS else {*table, 65})
        expected = rendered.label.astype(int)
        if name == "synthia":
            expected[np.isin(expected, (9, 14, 16))] = 255
        assert np.array_equal(decoded(raw, table), expected)
        shown = cv2.imread(str(image))[..., ::-1].astype(int)
        difference = np.abs(shown - rendered.image)
        assert difference.max() == 0 if image.suffix == ".png" else difference.mean() < 4


def test_file_formats_are_those_of_the_real_datasets(tmp_path):
    modes = {
        "gta5": "P",
        "cityscapes_val": "L",
        "bdd_val": "L",
        "mapillary_val": "P",
        "acdc_fog_val": "L",
    }
    for name, mode in modes.items():
        ((image, label),) = write(tmp_path, name, count=1)
        with Image.open(label) as opened:
            assert (opened.format, opened.mode) == ("PNG", mode)
        jpeg = name in ("bdd_val", "mapillary_val")
        with Image.open(image) as opened:
            assert (opened.format, opened.mode) == ("JPEG" if jpeg else "PNG", "RGB")
    ((_, label),) = write(tmp_path, "synthia", count=1)
    channels = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
    assert channels.dtype == np.uint16
    assert channels.shape == (*SIZE, 3)
    assert channels[..., 1].max() > 0  # instances


def test_palette_shows_classes_in_their_colors(tmp_path):
    ((_, label),) = write(tmp_path, "gta5", count=1)
    opened = Image.open(label)
    raw, colors = np.array(opened), np.array(opened.convert("RGB"))
    assert (colors[raw == 7] == (128, 64, 128)).all()  # road
    assert (colors[raw == 23] == (70, 130, 180)).all()  # sky


def test_mapillary_images_differ_in_size_and_the_others_do_not(tmp_path):
    def sizes(name: str) -> set[tuple[int, ...]]:
        return {cv2.imread(str(image)).shape for image, _ in write(tmp_path, name, count=8)}

    assert len(sizes("mapillary_val")) > 2
    assert sizes("bdd_val") == {(72, 128, 3)}


@pytest.mark.parametrize("name", [*LAYOUTS, "bdd_train", "mapillary_train", "acdc_snow_train"])
def test_the_library_reads_the_written_files(tmp_path, name):
    pairs = write(tmp_path, name)
    dataset = get_dataset(name, tmp_path)
    records = dataset.records()
    assert {record.image for record in records} == {image for image, _ in pairs}
    for record in records:
        label = dataset.read_label(record)
        assert set(np.unique(label)) <= {*dataset.classes_present, 255}
        assert (label == 0).mean() > 0.03  # there is a road


def test_unlabelled_classes_can_be_visible(tmp_path):
    """Terrain, truck and train of synthia are on the image and have raw id 0, void."""
    hidden, seen = set(), set()
    for n in range(12):
        recipe = Recipe.of("synthia", 3, SIZE, show_unlabelled=True)
        image, label = sample_paths(tmp_path, "synthia", n)
        write_sample(recipe, n, image, label)
        rendered = render_sample(recipe, n)
        raw = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)[..., 2]
        unlabelled = np.isin(rendered.label, (9, 14, 16))
        assert (raw[unlabelled] == 0).all()
        assert set(np.unique(raw)) <= {0, *SYNTHIA}
        hidden |= set(np.unique(render_sample(Recipe.of("synthia", 3, SIZE), n).label))
        seen |= set(np.unique(rendered.label[unlabelled]))
    assert seen == {9, 14, 16} and not {14, 16} & hidden


def test_train_and_validation_images_differ():
    train, val = (
        render_sample(Recipe.of(name, 0, SIZE), 0)
        for name in ("cityscapes_train", "cityscapes_val")
    )
    assert not np.array_equal(train.label, val.label)


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError(28, "No space left on device")

    image, label = sample_paths(tmp_path, "gta5", 0)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_sample(Recipe.of("gta5", 0, SIZE), 0, image, label)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


# ---------------------------------------------------------------------- the folder and its record
def make(root: Path, count: int = 2, seed: int = 0, size=SIZE, overwrite: bool = False) -> int:
    jobs = demo_data.prepare(root, {"gta5": count}, seed, size, overwrite)
    return len(list(dataset_writer.run(jobs, workers=1)))


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.png")}


def test_existing_images_are_not_rendered_again(tmp_path):
    assert make(tmp_path) == 2
    before = contents(tmp_path)
    assert make(tmp_path) == 0
    assert contents(tmp_path) == before


def test_an_interrupted_run_is_resumed_with_the_same_result(tmp_path):
    make(tmp_path / "whole", count=4)
    jobs = demo_data.prepare(tmp_path / "torn", {"gta5": 4}, 0, SIZE)
    run = dataset_writer.run(jobs, workers=1)
    next(run), next(run)
    run.close()
    (tmp_path / "torn/gta5/labels/00001.png").unlink()
    assert make(tmp_path / "torn", count=4) == 3
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_several_processes_render_the_same_as_one(tmp_path):
    make(tmp_path / "one", count=6)
    jobs = demo_data.prepare(tmp_path / "two", {"gta5": 6}, 0, SIZE)
    done = list(dataset_writer.run(jobs, workers=2))
    assert [job.index for job in done] == list(range(6))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_more_images_are_added_to_existing_ones(tmp_path):
    make(tmp_path, count=2)
    before = contents(tmp_path)
    assert make(tmp_path, count=3) == 1
    assert before.items() < contents(tmp_path).items()


@pytest.mark.parametrize("change", [{"seed": 1}, {"size": (80, 128)}, {"count": 1}])
def test_other_settings_are_an_error_unless_overwriting(tmp_path, change):
    make(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"gta5 in .* has 2 images of 72x128, seed 0; requested"
    ):
        make(tmp_path, **change)
    assert contents(tmp_path) == before
    make(tmp_path, **change, overwrite=True)
    after = contents(tmp_path)
    assert len(after) == 2 * change.get("count", 2)
    if "count" not in change:
        assert not set(before.values()) & set(after.values())


def test_images_of_an_older_renderer_are_not_mixed_with_new_ones(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr(demo_data, "RENDERER_VERSION", demo_data.RENDERER_VERSION + 1)
    jobs = {"gta5": 2}
    record = json.loads((tmp_path / "demo_data.json").read_text())
    record["gta5"]["painter"] = 0
    (tmp_path / "demo_data.json").write_text(json.dumps(record))
    with pytest.raises(FileExistsError, match="renderer version 0"):
        demo_data.prepare(tmp_path, jobs, 0, SIZE)


def test_the_record_has_the_format_of_earlier_versions(tmp_path):
    make(tmp_path)
    record = {"gta5": {"seed": 0, "size": [72, 128], "count": 2, "painter": 1}}
    assert json.loads((tmp_path / "demo_data.json").read_text()) == record


def test_visible_unlabelled_classes_are_in_the_record(tmp_path):
    """Of datasets without all classes only; a folder with other images is not extended."""
    counts = {"gta5": 1, "synthia": 1}
    demo_data.prepare(tmp_path, counts, 0, SIZE, show_unlabelled=True)
    record = json.loads((tmp_path / "demo_data.json").read_text())
    assert record["gta5"] == {"seed": 0, "size": [72, 128], "count": 1, "painter": 1}
    assert record["synthia"] == record["gta5"] | {"show_unlabelled": True}
    assert demo_data.read_record(tmp_path)["synthia"].show_unlabelled
    message = "has 1 images of 72x128, seed 0, with unlabelled classes; requested are 1 images of"
    with pytest.raises(FileExistsError, match=f"synthia in .* {message}"):
        demo_data.prepare(tmp_path, counts, 0, SIZE)
    jobs = demo_data.prepare(tmp_path, counts, 0, SIZE, show_unlabelled=True)
    assert [job.recipe.show_unlabelled for job in jobs] == [False, True]


def test_a_real_dataset_is_never_changed(tmp_path):
    real = tmp_path / "gta5/images/00001.png"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="may be a real dataset"):
            make(tmp_path, overwrite=overwrite)
    assert real.read_bytes() == b"precious"
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_a_broken_record_is_reported(tmp_path):
    (tmp_path / "demo_data.json").write_text("{")
    with pytest.raises(ValueError, match=r"demo_data\.json is broken"):
        make(tmp_path)


# ---------------------------------------------------------------------- the command line
def run(capsys, *args) -> tuple[int, str, str]:
    try:
        code = make_demo_data.main([str(arg) for arg in args])
    except SystemExit as leaving:
        code = leaving.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


SMALL = ("--size", 64, 96, "--train", 2, "--val", 1, "--workers", 1)


def test_the_tool_renders_all_datasets_and_a_contact_sheet(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    code, out, _ = run(capsys, "--output", tmp_path / "d", *SMALL, "--contact-sheet", sheet)
    assert code == 0
    for family in ("gta5", "synthia", "cityscapes", "bdd100k", "mapillary_vistas", "acdc"):
        assert (tmp_path / "d" / family).is_dir()
    assert "Rendered 13 images" in out  # 2 + 2 + (2 + 1) + 1 + 1 + 4
    assert f"export DETECTRON2_DATASETS={tmp_path / 'd'}" in out
    _, out, _ = run(capsys, "--output", tmp_path / "a b", *SMALL, "--datasets", "gta5")
    assert f"export DETECTRON2_DATASETS='{tmp_path / 'a b'}'" in out
    assert "clouds train" in out
    shown = np.array(Image.open(sheet))
    for c in (0, 2, 8, 10, 13):
        assert (shown == CITYSCAPES_19.colors[c]).all(axis=2).sum() > 1000
    code, out, _ = run(capsys, "--output", tmp_path / "d", *SMALL)
    assert code == 0
    assert "Nothing to render" in out


def test_unlabelled_classes_are_shown_on_request(tmp_path, capsys):
    code, _, _ = run(capsys, "--output", tmp_path, *SMALL, "--datasets", "synthia")
    assert code == 0 and not demo_data.read_record(tmp_path)["synthia"].show_unlabelled
    args = ("--output", tmp_path, *SMALL, "--datasets", "synthia", "--show-unlabelled")
    code, _, err = run(capsys, *args)
    assert code == 2 and "Add --overwrite" in err
    code, _, _ = run(capsys, *args, "--overwrite")
    assert code == 0 and demo_data.read_record(tmp_path)["synthia"].show_unlabelled


def test_single_splits_can_be_chosen(tmp_path, capsys):
    code, out, _ = run(capsys, "--output", tmp_path, *SMALL, "--datasets", "bdd_train", "gta5")
    assert code == 0
    assert "Rendered 4 images" in out
    assert len(list((tmp_path / "bdd100k/images/10k/train").glob("*.jpg"))) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--datasets", "kitti"), "unknown dataset 'kitti'. Known: gta5, synthia, cityscapes"),
        (
            ("--size", "32", "512"),
            "image size is 32x512 (rows x columns); both must be at least 64",
        ),
        (("--seed", "-1"), "seed is -1"),
        (("--val", "0"), "--val must be at least 1"),
    ],
)
def test_invalid_arguments_are_reported(tmp_path, capsys, args, message):
    code, _, err = run(capsys, "--output", tmp_path / "d", *SMALL, *args)
    assert code == 2
    assert message in err
    assert not list(tmp_path.rglob("*.png"))


def test_an_output_that_is_a_file_is_reported(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "--output", tmp_path / "file", *SMALL)
    assert code == 2
    assert f"{tmp_path / 'file'} is a file; --output must name a folder" in err
    code, _, err = run(capsys, "--output", tmp_path / "file/below", *SMALL)
    assert code == 2
    assert f"cannot write {tmp_path / 'file/below'}" in err


def test_no_workers_is_an_error(capsys):
    code, _, err = run(capsys, "--workers", 0)
    assert code == 2
    assert "--workers must be at least 1" in err


def test_every_listed_name_can_be_rendered():
    assert set(demo_data.image_counts((), 1, 1)) <= set(dataset_writer.dataset_names())
    for name in dataset_writer.dataset_names():
        assert get_dataset(name).name == name
