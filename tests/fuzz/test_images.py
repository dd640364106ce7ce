"""Mutated images, labels and dataset folders, and objects given to a loaded model."""

from __future__ import annotations

import io

import numpy as np
from fuzzing import ACCEPTED, VALUES, fuzz, mutate, mutations
from hypothesis import strategies as st
from PIL import Image

from clouds.data.dataset_report import check_dataset
from clouds.data.datasets import dataset_names, get_dataset
from clouds.data.datasets.registered import describe, list_samples
from clouds.data.labels import LabelFormat, LabelMapping, read_label, read_train_ids
from clouds.data.reading import read_image, read_size

SIZE = (9, 13)
RNG = np.random.default_rng(0)
COLORS = Image.fromarray(RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
GRAY = Image.fromarray(RNG.integers(0, 34, SIZE, dtype=np.uint8))
DEEP = Image.fromarray(RNG.integers(0, 2**16, SIZE, dtype=np.uint16))
EXIF = Image.Exif()
EXIF[0x0112] = 6


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


PALETTE = GRAY.copy()
PALETTE.putpalette(bytes(RNG.integers(0, 256, 768, dtype=np.uint8)))
FILES = (
    encoded(COLORS, "PNG"),
    encoded(GRAY, "PNG"),
    encoded(DEEP, "PNG"),
    encoded(PALETTE, "PNG"),
    encoded(COLORS.convert("RGBA"), "PNG", exif=EXIF),
    encoded(COLORS, "JPEG", quality=90),
    encoded(COLORS, "JPEG", progressive=True, exif=EXIF),
    encoded(COLORS.convert("CMYK"), "JPEG"),
    encoded(GRAY, "JPEG"),
    encoded(COLORS, "WEBP", lossless=True),
    encoded(COLORS, "WEBP", exif=EXIF),
    encoded(COLORS, "TIFF", compression="tiff_lzw"),
    encoded(DEEP, "TIFF"),
    encoded(GRAY, "TIFF", exif=EXIF),
    encoded(GRAY, "GIF"),
    encoded(COLORS, "BMP"),
    encoded(COLORS, "PPM"),
)
IDS = LabelMapping("ids", {0: tuple(range(34))}, (255,))
CHANNELS = ("index", "red", "color")
FORMATS = {
    c: LabelFormat(".png", IDS, c, colors=((7, (0, 0, 0)), (8, (9, 9, 9)))) for c in CHANNELS
}
LOSSLESS = tuple(range(5)) + tuple(range(11, 17))


@fuzz("images", 14000, drawn=mutations(len(FILES)))
def test_images(attempt, tmp_path, drawn):
    seed, changes = drawn
    path = tmp_path / "image.png"
    path.write_bytes(mutate(FILES[seed], changes))
    outcome, pixels = attempt(lambda: read_image(path), "image.png")
    if outcome == ACCEPTED:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert pixels.size
        outcome, size = attempt(lambda: read_size(path), "image.png")
        assert outcome == ACCEPTED and size == pixels.shape[:2]


@fuzz("labels", 10000, drawn=mutations(len(FILES)), channel=st.sampled_from(list(FORMATS)))
def test_labels(attempt, tmp_path, drawn, channel):
    seed, changes = drawn
    path = tmp_path / "label.png"
    path.write_bytes(mutate(FILES[seed], changes))
    outcome, ids = attempt(lambda: read_label(path, FORMATS[channel]), "label.png")
    if outcome == ACCEPTED:
        assert ids.ndim == 2 and ids.size and np.issubdtype(ids.dtype, np.integer)
        dataset = get_dataset("cityscapes_val", tmp_path)
        label_format = dataset.label_formats[0]
        outcome, train_ids = attempt(
            lambda: read_train_ids(path, label_format, "cityscapes_val"), "label.png"
        )
        if outcome == ACCEPTED:
            assert {*np.unique(train_ids).tolist()} <= {*range(19), 255}


# ---------------------------------------------------------------------- folders
PLACES = st.sampled_from(
    [
        *("camvid/val/a.png", "camvid/valannot/a.png", "camvid/val", "camvid/valannot", "camvid"),
        *("camvid/val/b.PNG", "camvid/valannot/b.png", "camvid/val/.hidden/a.png"),
        *("camvid/val/a.png.png", "camvid/val/sub/c.png", "camvid/valannot/sub/c.png"),
        *("stable_diffusion/x/images/0.png", "stable_diffusion/x/manifest.jsonl"),
        *("stable_diffusion", "stable_diffusion/x", "stable_diffusion/x/images"),
        *("stable_diffusion/.x/images/0.png", "camvid/val/caf\udce9.png"),
    ]
)
CONTENTS = st.sampled_from(["image", "label", "empty", "text", "folder", "gone", "self", "up"])


def make(path, content):
    if path.is_symlink() or path.exists() or any(p.is_file() for p in path.parents):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # a link in the way
        return
    if content in ("image", "label"):
        path.write_bytes(FILES[0 if content == "image" else 1])
    elif content == "folder":
        path.mkdir()
    elif content in ("empty", "text"):
        path.write_text("" if content == "empty" else "text\n")
    else:
        targets = {"gone": "no/such/file", "self": path.name, "up": ".."}
        path.symlink_to(targets[content])


@fuzz("dataset folders", 1500, tree=st.lists(st.tuples(PLACES, CONTENTS), max_size=8))
def test_dataset_folders(attempt, tmp_path, tree):
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    root.mkdir()
    for place, content in tree:
        make(root / place, content)

    for name, folder in (("camvid_val", "camvid"), ("sd_x", "stable_diffusion")):
        dataset = get_dataset(name, root)
        outcome, report = attempt(lambda dataset=dataset: check_dataset(dataset, None, 1), folder)
        if outcome == ACCEPTED:
            assert (report.state == "ok") == (not report.problems())
        attempt(dataset.records, folder, name)
    attempt(lambda: dataset_names(root), "stable_diffusion")


METADATA = st.dictionaries(
    st.sampled_from(["stuff_classes", "stuff_colors", "ignore_label", "x"]),
    VALUES | st.lists(st.text(max_size=3), max_size=3) | st.lists(st.lists(st.integers(-1, 256))),
)
SAMPLES = VALUES | st.lists(
    st.dictionaries(st.sampled_from(["file_name", "sem_seg_file_name"]), VALUES), max_size=3
)


@fuzz("registered datasets", 3000, metadata=METADATA, samples=SAMPLES)
def test_registered(attempt, tmp_path, metadata, samples):
    outcome, description = attempt(lambda: describe("mine", metadata), "mine")
    if outcome == ACCEPTED:
        assert len(description.label_space.colors) == description.label_space.num_classes > 0
    good = describe("mine", {"stuff_classes": ["road"]})
    attempt(lambda: list_samples("mine", samples, good.label_formats[0]), "mine")
