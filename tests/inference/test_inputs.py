"""Inputs of the command line: what they name, and the names of their outputs."""

from __future__ import annotations

import os

import pytest

from clouds.inference.inputs import Input, check_outputs, different_names, find_inputs


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(*words):
    return [item.source for item in find_inputs([str(word) for word in words])]


def test_files_folders_and_patterns(tmp_path):
    touch(tmp_path, "b.png", "a.JPG", "c.txt", "d.mp4", ".hidden.png", "sub/e.png", "x[1].png")
    assert found(tmp_path) == [tmp_path / "a.JPG", tmp_path / "b.png", tmp_path / "x[1].png"]
    assert found(tmp_path / "d.mp4", tmp_path / "c.txt") == [tmp_path / "d.mp4", tmp_path / "c.txt"]
    assert found(tmp_path / "*") == [
        tmp_path / name for name in ("a.JPG", "b.png", "d.mp4", "x[1].png")
    ]
    assert tmp_path / "sub/e.png" in found(tmp_path / "**/*.png")
    assert found(tmp_path / "x[1].png") == [tmp_path / "x[1].png"]  # a file, no pattern
    assert found(tmp_path / "b.png", tmp_path, tmp_path / "*.png").count(tmp_path / "b.png") == 1


def test_all_with_the_name_of_an_image_is_found_but_folders(tmp_path):
    """What is no image is named when it cannot be read."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/nowhere")
    (tmp_path / "c.png").symlink_to(tmp_path / "c.png")
    (tmp_path / "d.png").mkdir()
    os.mkfifo(tmp_path / "e.txt")
    expected = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    assert found(tmp_path) == found(tmp_path / "*.png") == expected
    check_outputs(find_inputs([str(tmp_path)]), tmp_path / "out", ["labels"])


def test_a_number_is_a_camera_unless_it_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (camera,) = find_inputs(["0"])
    assert (camera.source, camera.name, camera.is_video) == (0, "camera0", True)
    touch(tmp_path, "0")
    assert str(find_inputs(["0"])[0].source) == "0"
    assert not find_inputs(["0"])[0].is_video


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("none.png", "does not exist; allowed are.*KEY VALUE"),
        ("TEST.SHORT_SIDE", "KEY VALUE overrides come after"),
        ("*.gif", "matches no image"),
        ("sub", r"without image files.*sub/\*\*/\*\.png"),
    ],
)
def test_words_that_name_nothing(tmp_path, monkeypatch, word, what):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.png", "sub/notes.txt", "sub/deeper/b.png")
    with pytest.raises(ValueError, match=what):
        find_inputs(["a.png", word])


def test_names_differ():
    assert different_names(["a", "b", "a", "A"]) == ["a", "b", "a_2", "A_3"]
    assert different_names(["a", "a", "a_2"]) == ["a", "a_3", "a_2"]
    assert different_names(["a_2", "a", "a"]) == ["a_2", "a", "a_3"]


def test_outputs(tmp_path):
    image, video = Input(tmp_path / "a.png", "a"), Input(tmp_path / "b.mp4", "b")
    kinds = ("labels", "overlay")
    out = tmp_path / "out"
    assert image.outputs(out, kinds) == {
        "labels": out / "a_labels.png",
        "overlay": out / "a_overlay.png",
    }
    assert video.outputs(out, kinds) == {"overlay": out / "b_overlay.mp4"}
    check_outputs([image, video], out, kinds)
    with pytest.raises(ValueError, match="for videos color and overlay are written"):
        check_outputs([video], out, ["labels"])


def test_an_input_is_never_replaced(tmp_path):
    touch(tmp_path, "a.png", "a_labels.png")
    inputs = find_inputs([str(tmp_path)])
    with pytest.raises(ValueError, match=r"a_labels\.png.*would replace an input"):
        check_outputs(inputs, tmp_path / "." / "sub" / "..", ["labels"])
    check_outputs(inputs, tmp_path, ["overlay"])
