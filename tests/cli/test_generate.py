"""Folders of generated images: resumed, distributed over processes, refused, written atomically.

The files of an interrupted and resumed run are compared byte by byte with an uninterrupted one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clouds.cli import generate
from clouds.config import load_config
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.datasets.manifest import read_manifest
from clouds.generation import job as jobs
from clouds.generation.generators import build_generator
from clouds.generation.generators.registry import GeneratedImage

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/generate_images.py"
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "projects/street_renderer")])
PROMPTS = ("a tram at night in the rain", "a bus beside a wall", "cars in the snow")
SIZE = 64


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def command(output: Path, prompts: Path, count: int, *more: str) -> list[str]:
    return [
        "--output", str(output), "--prompts", str(prompts), "--generator", "procedural",
        "--count", str(count), "--height", str(SIZE), "--width", str(SIZE), *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return own | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


def make_job(
    output: Path, count: int = 6, seed: int = 0, prompts=PROMPTS, size=SIZE
) -> jobs.GenerationJob:
    generator = build_generator("procedural", {"height": size, "width": size})
    return jobs.GenerationJob(output, generator, tuple(prompts), count, seed)


def fill(folder: jobs.GenerationJob, **options: bool) -> list[int]:
    jobs.prepare(folder, **options)
    return list(jobs.generate(folder, jobs.remaining(folder)))


def hashes(output: Path) -> dict[str, str]:
    """Name -> hash of all images and labels."""
    files = [*(output / "images").iterdir(), *(output / "labels").iterdir()]
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def lines(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- output files
def test_folder_holds_images_labels_and_a_line_for_each(tmp_path):
    folder = make_job(tmp_path / "a", count=5, seed=3)
    assert fill(folder) == [0, 1, 2, 3, 4]
    for number, line in enumerate(lines(folder.output)):
        image = folder.output / "images" / f"{number:06d}.png"
        state = np.random.SeedSequence([3, number]).generate_state(1, np.uint64)
        assert line == {
            "file": image.name, "prompt": PROMPTS[number % 3], "seed": int(state[0]) >> 1,
            "generator": "procedural", "model": "", "height": SIZE, "width": SIZE,
            "sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
        }  # fmt: skip
        generated = folder.generator.generate([line["prompt"]], [line["seed"]])[0]
        assert np.array_equal(np.array(Image.open(image)), generated.image)  # RGB, lossless
        label = np.array(Image.open(folder.output / "labels" / image.name))
        assert np.array_equal(label, generated.label)
    assert len(hashes(folder.output)) == 10


def test_advice_can_be_pasted(tmp_path):
    """Read by a shell's rules: the folder has a space, and so has the list of datasets."""
    root = tmp_path / "my data"
    prompts = tmp_path / "p.txt"
    prompts.write_text("a street\n")
    done = subprocess.run(
        [sys.executable, TOOL, *command(root / "stable_diffusion/a b", prompts, 1)],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    advice = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert advice[0] == ["export", f"DETECTRON2_DATASETS={root}"]
    assert advice[1][-2:] == ["--datasets", "sd_a b"]
    assert load_config(None, advice[2]).DATASETS.TRAIN == ("gta5", "sd_a b")


def test_dataset_table_reads_the_folder(tmp_path):
    folder = make_job(tmp_path / "stable_diffusion/mine", count=4)
    fill(folder)
    forget_listings()
    records = get_dataset("sd_mine", tmp_path).records()
    assert [record.image.name for record in records] == [f"{n:06d}.png" for n in range(4)]


def test_more_images_of_the_same_prompts_extend_a_folder(tmp_path):
    fill(make_job(tmp_path / "a", count=3))
    before = hashes(tmp_path / "a")
    assert fill(make_job(tmp_path / "a", count=5)) == [3, 4]
    fill(make_job(tmp_path / "b", count=5))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert before.items() <= hashes(tmp_path / "a").items()


def test_batches_hold_only_what_is_missing(tmp_path):
    class Recorder:
        name, model, size, settings, batch_size, has_labels = "recorder", "m", (8, 8), {}, 4, False

        def __init__(self):
            self.calls: list[list[str]] = []

        def generate(self, prompts, seeds):
            self.calls.append(list(prompts))
            images = [np.random.default_rng(s).integers(0, 256, (8, 8, 3), np.uint8) for s in seeds]
            return [GeneratedImage(image) for image in images]

        def prompt_warnings(self, prompts):
            return []

    recorder = Recorder()
    folder = jobs.GenerationJob(tmp_path / "a", recorder, tuple(str(n) for n in range(10)), 10)
    jobs.prepare(folder)
    assert list(jobs.generate(folder, [1, 5])) == [1, 5]
    recorder.calls.clear()
    list(jobs.generate(folder, jobs.remaining(folder)))
    assert recorder.calls == [["0", "2", "3", "4"], ["6", "7", "8", "9"]]
    assert not (folder.output / "labels").exists()
    assert jobs.remaining(folder) == []
    # Shares of three processes: every third number.
    (folder.output / "images" / "000004.png").unlink()
    (folder.output / "images" / "000007.png").unlink()
    (folder.output / "images" / "000008.png").unlink()
    assert [jobs.remaining(folder, rank, 3) for rank in range(3)] == [[], [4, 7], [8]]


def test_a_model_in_a_folder_whose_name_is_not_utf8(tmp_path):
    generator = SafetyChecker(())
    generator.model = os.fsdecode(b"/models/a\xff")
    folder = jobs.GenerationJob(tmp_path / "a", generator, ("Zürich",), 2)
    fill(folder)
    record = jobs.read_record(folder.output)
    assert record["model"] == generator.model and record["prompts"] == ["Zürich"]
    assert "Zürich" in (folder.output / "generation.json").read_text("utf-8")
    assert [e.model for e in read_manifest(folder.manifest).values()] == [generator.model] * 2
    fill(folder)  # resumed with the same settings


# ---------------------------------------------------------------------- images of one color
class SafetyChecker:
    """A generator whose images are black for some seeds."""

    name, model, size, settings, has_labels = "checker", "m", (8, 8), {}, False
    batch_size = 4

    def __init__(self, refused):
        self.refused = refused

    def generate(self, prompts, seeds):
        images = [np.random.default_rng(s).integers(0, 256, (8, 8, 3), np.uint8) for s in seeds]
        return [
            GeneratedImage(image * (s not in self.refused))
            for image, s in zip(images, seeds, strict=True)
        ]

    def prompt_warnings(self, prompts):
        return []


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def test_images_of_one_color_are_drawn_again_with_further_seeds(tmp_path, caplog):
    generator = SafetyChecker({seed_of(7, 2), seed_of(7, 2, 1), seed_of(7, 3)})
    folder = jobs.GenerationJob(tmp_path / "a", generator, ("a", "b"), 6, 7, max_redraws=2)
    assert fill(folder) == list(range(6))
    expected = [seed_of(7, 0), seed_of(7, 1), seed_of(7, 2, 2), seed_of(7, 3, 1)]
    entries = lines(folder.output)
    assert [line["seed"] for line in entries] == [*expected, seed_of(7, 4), seed_of(7, 5)]
    assert [line.get("redraws") for line in entries] == [None, None, 2, 1, None, None]
    for line in entries:
        image = np.array(Image.open(folder.output / "images" / str(line["file"])))
        rng = np.random.default_rng(line["seed"])
        assert np.array_equal(image, rng.integers(0, 256, (8, 8, 3), np.uint8))
    assert [m for m in caplog.messages if "000003" in m] == [
        "image 000003.png of the prompt 'b' has only the color (0, 0, 0) (RGB); it is drawn again "
        "(1 of 2)"
    ]
    assert jobs.num_redrawn(folder) == 2
    # one that is missing is drawn again in the same way
    before = (folder.output / "images/000002.png").read_bytes()
    (folder.output / "images/000002.png").unlink()
    assert fill(folder) == [2]
    assert (folder.output / "images/000002.png").read_bytes() == before


@pytest.mark.parametrize("max_redraws", [0, 2])
def test_an_image_that_has_one_color_in_all_draws_is_an_error(tmp_path, max_redraws):
    generator = SafetyChecker({seed_of(0, 2), *(seed_of(0, 2, i) for i in range(1, 9))})
    folder = jobs.GenerationJob(tmp_path / "a", generator, ("a",), 4, 0, max_redraws)
    jobs.prepare(folder)
    message = (
        rf"image 000002\.png of the prompt 'a' has only .* all of its {max_redraws + 1} draws.*"
    )
    with pytest.raises(ValueError, match=message + r"safety checker.*--dtype.*--max-redraws"):
        list(jobs.generate(folder, jobs.remaining(folder)))
    written = {path.name for path in (folder.output / "images").iterdir()}
    assert written == {line["file"] for line in lines(folder.output)}
    assert len(written) == 2


def test_the_number_of_redraws_is_not_negative(tmp_path):
    with pytest.raises(ValueError, match="--max-redraws is -1; it must not be negative"):
        jobs.GenerationJob(tmp_path, SafetyChecker(()), ("a",), 4, 0, -1)


# ---------------------------------------------------------------------- interrupted runs
def test_killed_run_is_resumed_with_the_same_images(tmp_path, prompts):
    count = 30
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    start = [sys.executable, str(TOOL), *command(broken, prompts, count)]
    process = subprocess.Popen(start, env=environment(), stderr=subprocess.DEVNULL)
    manifest = broken / "manifest.jsonl"
    deadline = time.monotonic() + 60
    while not (manifest.is_file() and manifest.read_bytes().count(b"\n") >= 8):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = manifest.read_bytes().count(b"\n")
    assert 8 <= kept < count
    done = subprocess.run(start, env=environment(), capture_output=True, text=True, check=True)
    assert f"{count} images in" in done.stdout
    fill(make_job(whole, count))
    assert hashes(broken) == hashes(whole)
    assert lines(broken) == lines(whole)
    assert list(broken.rglob(".*")) == []  # no temporary files


def test_images_without_a_manifest_line_are_generated_again(tmp_path):
    fill(make_job(tmp_path / "whole"))
    broken = make_job(tmp_path / "broken")
    fill(broken)
    rows = broken.manifest.read_bytes().splitlines(keepends=True)
    # Killed while the last line was written, with a half-written image beside.
    broken.manifest.write_bytes(b"".join(rows[:-1]) + rows[-1][:20])
    (broken.output / "images/000005.png").write_bytes(b"half")
    (broken.output / f"images/.000006.png.{'0a' * 16}.part").write_bytes(b"half")
    (broken.output / "images/000001.png").unlink()
    (broken.output / "labels/000002.png").unlink()
    assert fill(broken) == [1, 2, 5]
    assert hashes(broken.output) == hashes(tmp_path / "whole")
    entries = read_manifest(broken.manifest)
    assert entries == read_manifest(tmp_path / "whole/manifest.jsonl")


def test_verify_generates_changed_images_again(tmp_path):
    folder = make_job(tmp_path / "a", count=3)
    fill(folder)
    before = hashes(folder.output)
    (folder.output / "images/000001.png").write_bytes(b"changed")
    assert fill(folder) == []
    assert fill(folder, verify=True) == [1]
    assert hashes(folder.output) == before


@pytest.mark.parametrize("where", ["data", "line"])
def test_full_disk_leaves_no_partial_files(tmp_path, monkeypatch, where):
    folder = make_job(tmp_path / "a", count=4)
    jobs.prepare(folder)
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    if where == "data":  # of the third image: each has two files
        real = os.fsync
        monkeypatch.setattr(os, "fsync", full)
    else:
        real = jobs.append_entry
        calls += [()] * 3
        monkeypatch.setattr(jobs, "append_entry", full)
    with pytest.raises(OSError, match=r"cannot write .*No space left.*Free some space") as raised:
        list(jobs.generate(folder, jobs.remaining(folder)))
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    finished = read_manifest(folder.manifest)
    for name, entry in finished.items():
        data = (folder.output / "images" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry.sha256
    assert list(folder.output.rglob(".*")) == []
    for path in (folder.output / "images").iterdir():
        Image.open(path).load()
    assert fill(folder) == sorted(set(range(4)) - {int(name[:-4]) for name in finished})
    fill(make_job(tmp_path / "whole", count=4))
    assert hashes(folder.output) == hashes(tmp_path / "whole")


def test_full_disk_in_one_line_on_the_command_line(tmp_path, prompts, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        generate.main(command(tmp_path / "a", prompts, 2))
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: cannot write") and "No space left" in message
    assert "[Errno" not in message


# ---------------------------------------------------------------------- several processes
def test_two_processes_make_the_same_images(tmp_path, prompts):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(TOOL), *command(tmp_path / "two", prompts, 9)],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "9 images in" in done.stdout
    fill(make_job(tmp_path / "one", 9))
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
    assert sorted(lines(tmp_path / "two"), key=lambda line: str(line["file"])) == lines(
        tmp_path / "one"
    )
    assert (tmp_path / "two/contact_sheet.png").is_file()


def test_a_refusal_reaches_every_process(tmp_path, prompts, monkeypatch):
    tool, folder = generate, make_job(tmp_path / "a", 3)
    fill(make_job(tmp_path / "a", 3, seed=1))
    before = hashes(folder.output)
    args = tool.parse(command(tmp_path / "a", prompts, 3))
    gathered: list[bool] = []
    monkeypatch.setattr("clouds.comm.all_gather", lambda x: gathered.append(x) or [x])
    with pytest.raises(FileExistsError, match="seed was 1 and is now 0"):
        tool.prepare_once(folder, args, rank=0, world_size=2)
    assert gathered == [True]
    # The other processes stop without an error message of their own.
    monkeypatch.setattr("clouds.comm.all_gather", lambda x: [True, x])
    with pytest.raises(SystemExit) as stop:
        tool.prepare_once(folder, args, rank=1, world_size=2)
    assert stop.value.code == 2
    assert hashes(folder.output) == before


# ---------------------------------------------------------------------- refusals
def test_other_settings_are_refused_and_named(tmp_path):
    output = tmp_path / "a"
    fill(make_job(output))
    before = hashes(output)
    others = [
        (make_job(output, seed=1), "seed was 0 and is now 1"),
        (make_job(output, size=80), "height was 64 and is now 80; width was 64 and is now 80"),
        (make_job(output, prompts=PROMPTS[:2]), "there were 3 prompts and are now 2"),
        (
            make_job(output, prompts=("x", *PROMPTS[1:])),
            "prompt 1 was 'a tram at .* and is now 'x'",
        ),
    ]
    for other, message in others:
        with pytest.raises(FileExistsError, match=rf"other settings: {message}.*--overwrite"):
            jobs.prepare(other)
    assert hashes(output) == before


def test_overwrite_deletes_only_generated_files(tmp_path):
    output = tmp_path / "a"
    fill(make_job(output, count=6))
    (output / "notes.txt").write_text("mine")
    (output / "images/mine.png").write_bytes(b"mine")
    assert fill(make_job(output, count=2, seed=1), overwrite=True) == [0, 1]
    assert (output / "notes.txt").is_file() and (output / "images/mine.png").is_file()
    (output / "images/mine.png").unlink()
    fill(make_job(tmp_path / "b", count=2, seed=1))
    assert hashes(output) == hashes(tmp_path / "b")
    assert len(lines(output)) == 2


def test_fewer_images_than_there_are_is_refused(tmp_path):
    fill(make_job(tmp_path / "a", count=6))
    with pytest.raises(FileExistsError, match=r"has 6 images.*--count is 4.*--count 6 or more"):
        jobs.prepare(make_job(tmp_path / "a", count=4))


def test_folder_without_a_record_is_not_changed(tmp_path):
    (tmp_path / "a/images").mkdir(parents=True)
    (tmp_path / "a/images/000000.png").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"images exists, but .*generation\.json"):
            jobs.prepare(make_job(tmp_path / "a"), overwrite=overwrite)
    assert (tmp_path / "a/images/000000.png").read_bytes() == b"precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        jobs.prepare(make_job(tmp_path / "file"))


def test_broken_record_is_an_error(tmp_path):
    fill(make_job(tmp_path / "a", count=1))
    (tmp_path / "a/generation.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation\.json is broken"):
        jobs.prepare(make_job(tmp_path / "a", count=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--steps", "5"], "'procedural' has no option --steps; it takes --height, --width"),
        (["--generator", "dalle"], "unknown generator 'dalle'"),
        (["--height", "9"], "at least 64"),
        (["--prompts", "/nothing.txt"], "/nothing.txt"),
    ],
)
def test_user_errors_are_one_line(tmp_path, prompts, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        generate.main([*command(tmp_path / "a", prompts, 2), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "a").exists()


def test_missing_model_on_the_command_line(tmp_path, prompts, capsys):
    pytest.importorskip("diffusers")
    arguments = ["--output", str(tmp_path / "a"), "--prompts", str(prompts), "--offline"]
    with pytest.raises(SystemExit) as stop:
        generate.main([*arguments, "--model", "nobody/nothing", "--device", "cpu"])
    assert stop.value.code == 2
    assert "the model nobody/nothing cannot be loaded" in capsys.readouterr().err


# ---------------------------------------------------------------------- messages
def test_command_prints_the_folder_and_draws_a_contact_sheet(tmp_path, prompts, capsys):
    output = tmp_path / "stable_diffusion/mine"
    generate.main(command(output, prompts, 8))
    printed = capsys.readouterr()
    assert "8 images in" in printed.out and "sd_mine" in printed.out
    assert f"DETECTRON2_DATASETS={tmp_path}" in printed.out
    assert "8/8" in printed.err and "image/s" in printed.err  # the bar
    sheet = np.array(Image.open(output / "contact_sheet.png"))
    assert sheet.shape[1] == 6 * (256 + 12) + 12  # six in a row
    # The first tile: the image over its label in class colors, scaled to 256 pixels.
    first = np.array(Image.open(output / "images/000000.png").resize((256, 256)))
    tile = sheet[60 : 60 + 256, 12 : 12 + 256]
    assert np.abs(first.astype(float) - tile).mean() < 8
    capsys.readouterr()
    generate.main(command(output, prompts, 8))  # nothing to do: says so and keeps everything
    assert "8 images in" in capsys.readouterr().out


def test_help_is_quick():
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(TOOL), "--help"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "--scheduler" in done.stdout
    assert time.monotonic() - start < 3


def test_the_prompts_of_the_package_are_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--generator", "procedural", "--height", "64", "--width", "128", "--count", "1"]
    generate.main([*words, "--output", "a"])
    prompts = (ROOT / "prompts/street_scenes.txt").read_text().splitlines()
    first = next(line for line in prompts if line and not line.startswith("#"))
    assert [line["prompt"] for line in lines(tmp_path / "a")] == [first]


def test_help_shows_the_default_model(capsys):
    from clouds.generation.generators.stable_diffusion import DEFAULT_MODEL

    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert f"(default: {DEFAULT_MODEL})" in " ".join(capsys.readouterr().out.split())
