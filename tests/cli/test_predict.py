"""`clouds predict`: its files, its errors and its exit status."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import block_image, save_checkpoint

import clouds
from clouds.cli import predict
from clouds.inference.segmentation import KINDS
from clouds.inference.video import VideoReader, VideoWriter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"))[0]


@pytest.fixture(autouse=True)
def logging_as_before():
    logger = logging.getLogger("clouds")
    level = logger.level
    yield
    logger.setLevel(level)


def run(*words):
    """Exit status of the command."""
    try:
        predict.main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_video(path, frames, rate=10.0):
    with VideoWriter(path, rate) as writer:
        for frame in frames:
            writer.write(frame)


def test_kinds_are_those_of_the_library():
    assert predict.KINDS == KINDS


def test_a_folder(weights, tmp_path, capsys):
    images = {
        name: save(tmp_path / f"in/{name}.png", block_image(64, 96, i))
        for i, name in enumerate("abc")
    }
    status = run("--weights", weights, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert status == 0
    assert capsys.readouterr().out.startswith("3 images in ")
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == sorted(f"{name}_{kind}.png" for name in "abc" for kind in KINDS)
    segmenter = clouds.load(weights)
    for name, image in images.items():
        expected = segmenter(image)
        labels = cv2.imread(str(tmp_path / f"out/{name}_labels.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(labels, expected.labels)
        path = tmp_path / f"out/{name}_confidence.png"
        confidence = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) / 65535
        np.testing.assert_allclose(confidence, expected.confidence, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"in/{name}.png")), image)


def test_what_is_written_and_overrides(weights, tmp_path):
    save(tmp_path / "a.png", block_image(64, 96))
    out = tmp_path / "out"
    words = (
        "--weights",
        weights,
        "--input",
        tmp_path / "a.png",
        "--save",
        "labels",
        "--batch-size",
    )
    assert run(*words, 2, "--output", out, "TEST.SHORT_SIDE", 32) == 0
    assert [p.name for p in out.iterdir()] == ["a_labels.png"]
    expected = clouds.load(weights, overrides=["TEST.SHORT_SIDE", 32])(tmp_path / "a.png").labels
    np.testing.assert_array_equal(np.asarray(Image.open(out / "a_labels.png")), expected)


def test_equal_names(weights, tmp_path):
    for i, name in enumerate(("x/a.png", "y/a.png", "y/a.jpg")):
        save(tmp_path / name, block_image(64, 96, i))
    words = ("--weights", weights, "--save", "color", "--input", tmp_path / "x", tmp_path / "y")
    assert run(*words, "--output", tmp_path / "out") == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"a_color.png", "a_2_color.png", "a_3_color.png"}


def test_unreadable_files(weights, tmp_path, capsys, caplog):
    save(tmp_path / "in/a.png", block_image(64, 96))
    data = (tmp_path / "in/a.png").read_bytes()
    (tmp_path / "in/b.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "in/c.jpg").write_bytes(b"no image")
    words = ("--weights", weights, "--save", "labels", "--output", tmp_path / "out", "--input")
    assert run(*words, tmp_path / "in") == 1
    assert "2 of 3 inputs could not be read: " in capsys.readouterr().out
    assert "b.png" in caplog.text and "c.jpg" in caplog.text
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a_labels.png"]
    assert run(*words, tmp_path / "in/b.png", tmp_path / "in/c.jpg") == 2
    assert "error: none of the 2 inputs can be read" in capsys.readouterr().err


def test_what_is_no_file_is_named_and_never_waited_for(weights, tmp_path, capsys, caplog):
    save(tmp_path / "in/a.png", block_image(64, 96))
    os.mkfifo(tmp_path / "in/b.png")
    (tmp_path / "in/c.png").symlink_to("/dev/zero")
    (tmp_path / "in/d.png").symlink_to("/nowhere")
    (tmp_path / "in/e.png").symlink_to(tmp_path / "in/e.png")
    os.mkfifo(tmp_path / "f.mp4")
    words = ("--weights", weights, "--save", "overlay", "--output", tmp_path / "out", "--input")
    assert run(*words, tmp_path / "in", tmp_path / "f.mp4") == 1
    assert "5 of 6 inputs could not be read: " in capsys.readouterr().out
    reasons = {
        "in/b.png": "a FIFO",
        "in/c.png": "a character device",
        "in/d.png": "No such file",
        "in/e.png": "symbolic links",
        "f.mp4": "a FIFO",
    }
    skipped = [message for message in caplog.messages if message.startswith("skipped")]
    for (name, reason), message in zip(reasons.items(), skipped, strict=True):
        assert str(tmp_path / name) in message and reason in message
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a_overlay.png"]
    assert run(*words, tmp_path / "in/b.png") == 2


def test_input_errors_come_before_the_model(tmp_path, capsys):
    save(tmp_path / "a.png", block_image(8, 8))
    words = ["--weights", "none.pth", "--output", tmp_path / "out"]
    for also, message in (
        (("--input", "none.png"), "input 'none.png' does not exist"),
        (("--input", "7"), "camera 7 has no end: give the number of --max-frames"),
        (("--input", tmp_path / "a.png"), "checkpoint 'none.pth' does not exist"),
        (("--input", tmp_path / "a.png", "--batch-size", "0"), "'0' is no whole number"),
        (("--input", tmp_path / "a.png", "--save", "depth"), "invalid choice: 'depth'"),
    ):
        assert run(*words, *also) == 2
        assert message in capsys.readouterr().err


def test_a_camera_that_does_not_exist(weights, tmp_path, capfd):
    words = ("--weights", weights, "--output", tmp_path, "--max-frames", 3)
    assert run(*words, "--input", 97) == 2
    assert "none of the 1 inputs can be read" in capfd.readouterr().err


def test_a_checkpoint_without_config(weights, tmp_path, capsys):
    save(tmp_path / "a.png", block_image(64, 96))
    bare = tmp_path / "bare.pth"
    torch.save({"model": torch.load(weights, weights_only=True)["model"]}, bare)
    assert run("--weights", bare, "--input", tmp_path / "a.png", "--output", tmp_path / "o") == 2
    assert "--config-file" in capsys.readouterr().err


# ------------------------------------------------------------------------ videos


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
def test_a_video_is_written_and_read(tmp_path, size):
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    write_video(tmp_path / "new/a.mp4", [np.full((*size, 3), c, np.uint8) for c in colors], 12.5)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.mp4"]
    frames, rate = frames_of(tmp_path / "new/a.mp4")
    assert rate == pytest.approx(12.5)
    reader = VideoReader(tmp_path / "new/a.mp4")
    assert (reader.num_frames, reader.rate) == (3, pytest.approx(12.5))
    for expected, seen, read in zip(colors, frames, list(reader), strict=True):
        assert seen.shape[:2] == (size[0] + size[0] % 2, size[1] + size[1] % 2)
        np.testing.assert_allclose(seen[10:20, 10:20].mean((0, 1)), expected, atol=8)
        np.testing.assert_array_equal(read, seen)
    assert len(list(VideoReader(tmp_path / "new/a.mp4", max_frames=2))) == 2


def test_a_video_that_is_not_finished_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 10.0) as writer:
        writer.write(block_image(32, 32))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_video_in_video_out(weights, tmp_path, capsys):
    write_video(tmp_path / "drive.mp4", [block_image(64, 96, i) for i in range(5)])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    inputs = (tmp_path / "drive.mp4", tmp_path / "broken.mp4")
    words = ("--weights", weights, "--batch-size", 2, "--output", out, "--input", *inputs)
    assert run(*words) == 1
    assert capsys.readouterr().out.startswith("5 images in ")
    assert {p.name for p in out.iterdir()} == {"drive_color.mp4", "drive_overlay.mp4"}
    color, rate = frames_of(out / "drive_color.mp4")
    overlay, _ = frames_of(out / "drive_overlay.mp4")
    assert (len(color), len(overlay), rate) == (5, 5, pytest.approx(10))
    assert color[0].shape == (64, 96, 3) and overlay[0].shape[1] == 240  # the legend's width
    segmenter = clouds.load(weights)
    frames, _ = frames_of(tmp_path / "drive.mp4")
    expected = [np.asarray(result.color_map(), float) for result in segmenter(frames)]
    for i, frame in enumerate(color):  # the codec is lossy
        distances = [np.abs(colors - frame).mean() for colors in expected]
        assert int(np.argmin(distances)) == i and distances[i] < 20


def test_the_command(weights, tmp_path):
    save(tmp_path / "a.png", block_image(64, 96))
    words = ["--weights", weights, "--input", tmp_path / "a.png", "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "clouds", "predict", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 images in ")
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_names_that_are_not_utf8(weights, tmp_path, caplog, escaped_logs):
    names = {kind: os.fsdecode(b"a\xff") + suffix for kind, suffix in
             (("image", ".png"), ("text", "_.png"), ("video", ".mp4"))}  # fmt: skip
    save(tmp_path / names["image"], block_image(64, 96))
    (tmp_path / names["text"]).write_text("text")
    write_video(tmp_path / "video.mp4", [block_image(64, 96)] * 2)
    (tmp_path / "video.mp4").rename(tmp_path / names["video"])
    inputs = [tmp_path / name for name in names.values()]
    code = run("--weights", weights, "--input", *inputs, "--output", tmp_path / "out")
    assert code == 1
    assert {os.fsencode(path.name) for path in (tmp_path / "out").iterdir()} == {
        b"a\xff_%s.png" % kind.encode() for kind in KINDS
    }
    assert r"a\udcff_.png: cannot be read as an image" in caplog.text
    assert r"a\udcff.mp4' cannot be opened: its path is not UTF-8" in caplog.text


def test_videos_are_not_written_to_paths_that_are_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"out\xff") / "a.mp4"
    with pytest.raises(OSError, match="cannot be written: its path is not UTF-8"):
        write_video(path, [block_image(64, 96)])


def test_files_for_bravo(weights, tmp_path, capsys):
    """Names and types as its toolkit's encode_submission wants: 8-bit ids, 16-bit confidence."""
    names = ("bravo_ACDC/fog/a_rgb_anon", "bravo_ACDC/rain/a_rgb_anon", "bravo_SMIYC/b")
    for i, name in enumerate(names):
        save(tmp_path / f"in/{name}.png", block_image(64, 96, i))
    words = ("--weights", weights, "--output", tmp_path / "out", "--bravo")
    assert run(*words, "--input", tmp_path / "in") == 0
    written = {
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")
    }
    assert written == {f"{name}_{kind}.png" for name in names for kind in ("pred", "conf")}
    expected = clouds.load(weights)(tmp_path / f"in/{names[1]}.png")
    pred, conf = (
        np.asarray(Image.open(tmp_path / f"out/{names[1]}_{k}.png")) for k in ("pred", "conf")
    )
    assert (pred.dtype, conf.dtype) == (np.uint8, np.uint16)
    assert (pred == expected.labels).all()
    np.testing.assert_allclose(conf / 65535, expected.confidence, atol=1 / 65535)
    assert run(*words, "--input", tmp_path / "none") == 2
    assert "is no folder" in capsys.readouterr().err
    assert run(*words, "--input", tmp_path / "in", "--save", "labels") == 2
    assert "--bravo needs one folder" in capsys.readouterr().err
