"""Reading of label files: how ids are stored, palettes, tables of colors, and lossy formats."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from cityscapesscripts.helpers.labels import labels as cityscapes_labels
from dataset_files import ANY_IDS, random_image, save, save_synthia
from PIL import Image

from clouds.data import labels
from clouds.data.datasets import get_dataset
from clouds.data.labels import LabelFormat, LabelMapping, read_train_ids
from clouds.data.reading import read_image

pytestmark = pytest.mark.usefixtures("decoder")


def read_label(path: Path, channel: labels.Channel = "index") -> np.ndarray:
    return labels.read_label(path, LabelFormat("", ANY_IDS, channel))


def test_gray_label(tmp_path):
    ids = np.arange(256, dtype=np.uint8).reshape(8, 32)
    read = read_label(save(tmp_path / "a.png", ids))
    assert read.dtype == np.uint8
    assert np.array_equal(read, ids)


@pytest.mark.parametrize("colors", [2, 16, 256])
def test_palette_label_keeps_its_indices(tmp_path, colors):
    # 2 and 16 colors are packed several to a byte
    ids = np.random.default_rng(0).integers(0, colors, (13, 17)).astype(np.uint8)
    image = Image.fromarray(ids)
    image.putpalette(np.random.default_rng(1).integers(0, 256, colors * 3, np.uint8).tobytes())
    image.save(tmp_path / "a.png", bits={2: 1, 16: 4, 256: 8}[colors])
    assert np.array_equal(read_label(tmp_path / "a.png"), ids)


def test_synthia_label_is_the_red_channel_of_sixteen_bits(tmp_path):
    ids = np.random.default_rng(0).integers(0, 23, (21, 30)).astype(np.uint8)
    path = save_synthia(tmp_path / "a.png", ids)
    assert np.array_equal(read_label(path, "red"), ids)


def test_red_of_four_channels(tmp_path):
    ids = np.random.default_rng(0).integers(0, 23, (21, 30)).astype(np.uint16)
    other = np.full_like(ids, 500)
    cv2.imwrite(str(tmp_path / "a.png"), np.stack([other, other + 1, ids, other + 2], axis=-1))
    assert np.array_equal(read_label(tmp_path / "a.png", "red"), ids)


def test_sixteen_bit_gray_label_is_not_truncated(tmp_path):
    ids = np.array([[0, 255, 256, 24001]], np.uint16)
    assert cv2.imwrite(str(tmp_path / "a.png"), ids)
    assert read_label(tmp_path / "a.png").tolist() == ids.tolist()
    assert read_label(tmp_path / "a.png", "red").tolist() == ids.tolist()


def test_label_with_the_same_id_in_all_channels(tmp_path):
    ids = np.random.default_rng(0).integers(0, 19, (6, 7)).astype(np.uint8)
    path = save(tmp_path / "a.png", np.repeat(ids[..., None], 3, axis=2))
    assert np.array_equal(read_label(path), ids)


def test_alpha_of_a_label_is_no_channel_of_ids(tmp_path):
    ids = np.random.default_rng(0).integers(0, 19, (6, 7)).astype(np.uint8)
    path = save(tmp_path / "a.png", np.stack([ids, ids, ids, np.full_like(ids, 255)], axis=-1))
    assert np.array_equal(read_label(path), ids)


def test_label_of_one_bit(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2, (6, 7)).astype(np.uint8)
    Image.fromarray(ids == 1).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "1"
    read = read_label(tmp_path / "a.png")
    assert read.dtype == np.uint8
    assert np.array_equal(read, ids)


def test_label_of_fractions(tmp_path):
    Image.fromarray(np.full((6, 7), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(
        ValueError, match=r"a\.tiff: cannot be read.*: TIFF file of mode F, 32 bits"
    ):
        read_label(tmp_path / "a.tiff")


def test_magenta_instead_of_a_label(tmp_path):
    path = save(tmp_path / "a.png", np.full((6, 7, 3), (9, 0, 9), np.uint8))
    with pytest.raises(ValueError, match="color image with 3 channels"):
        read_label(path)


def test_color_image_instead_of_a_label(tmp_path):
    path = save(tmp_path / "a_color.png", random_image(0))
    with pytest.raises(ValueError, match=r"a_color\.png.*color image.*file with the ids"):
        read_label(path)


def test_lossy_label(tmp_path):
    path = save(tmp_path / "a.jpg", np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"a\.jpg.*lossless"):
        read_label(path)


# ---------------------------------------------------------------- lossy formats


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("webp", {"lossless": True}),
        ("webp", {"lossless": True, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
        ("webp", {"lossless": True, "icc_profile": bytes(131)}),  # odd chunks end with a 0
        ("tiff", {"compression": "tiff_lzw"}),
        ("bmp", {}),
        ("ppm", {}),
        ("tga", {}),
    ],
)
def test_lossless_formats_are_accepted(tmp_path, suffix, options):
    ids = np.random.default_rng(0).integers(0, 19, (6, 7)).astype(np.uint8)
    Image.fromarray(np.repeat(ids[..., None], 3, axis=2)).save(tmp_path / f"a.{suffix}", **options)
    assert np.array_equal(read_label(tmp_path / f"a.{suffix}"), ids)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("webp", {"quality": 100}),
        ("webp", {"quality": 100, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
        ("avif", {"quality": 100}),
        ("jp2", {"irreversible": False}),  # lossless, but that cannot be told from the file
        ("tiff", {"compression": "jpeg"}),
        ("mpo", {}),
    ],
)
def test_files_that_may_be_lossy_are_refused(tmp_path, suffix, options):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path, **options)
    for channel in ("index", "red"):
        with pytest.raises(ValueError, match=rf"a\.{suffix}: a label map must be lossless"):
            read_label(path, channel)


# ---------------------------------------------------------------- gray values of few bits


def png_of(ids: np.ndarray, depth: int, palette: bytes = b"") -> bytes:
    """A gray or palette PNG of 1 to 16 bits per pixel, written by hand by the PNG specification."""
    bits = (ids[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(len(ids), -1).astype(np.uint8), axis=1)
    head = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], depth, 3 if palette else 0, 0, 0, 0)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [(b"IHDR", head), *[(b"PLTE", palette)] * bool(palette)]
    chunks += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 16])
def test_gray_values_are_read_as_they_are_stored(tmp_path, depth):
    ids = np.random.default_rng(0).integers(0, 2**depth, (5, 11))
    (tmp_path / "a.png").write_bytes(png_of(ids, depth))
    assert np.array_equal(read_label(tmp_path / "a.png"), ids)
    # as an image, black is 0 and white 255; OpenCV and Pillow reduce 16 bits differently
    scaled = ids * (255 / (2**depth - 1))
    assert np.abs(read_image(tmp_path / "a.png") - scaled[..., None]).max() <= (depth == 16)


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_tiff_of_few_bits(tmp_path, bits):
    # the TIFF specification: 8 entries of 12 bytes, then the only row
    row = {2: bytes([0b00011011]), 4: bytes([0x3F])}[bits]
    width = 8 // bits
    entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, 1), (273, 110), (278, 1)]
    body = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in [*entries, (279, 1)])
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 8) + body + bytes(4)
    (tmp_path / "a.tif").write_bytes(head + row)
    expected = {2: [[0, 1, 2, 3]], 4: [[3, 15]]}[bits]
    assert read_label(tmp_path / "a.tif").tolist() == expected


# ---------------------------------------------------------------- mapping


def test_mapping_of_sixteen_bits():
    mapping = LabelMapping("wide ids", {0: (0, 300), 1: (65535,)}, (24001,))
    raw = np.array([[0, 300], [65535, 24001]], np.uint16)
    for dtype in (np.uint16, np.int32, np.int64, np.dtype(">u2")):
        assert mapping.apply(raw.astype(dtype)).tolist() == [[0, 0], [1, 255]]
        assert mapping.unknown_ids(raw.astype(dtype)) == ()
        assert mapping.unknown_ids(np.array([[7, 65534, 300]], dtype)) == (7, 65534)
    assert mapping.apply(np.array([[-1, 65536, 300]])).tolist() == [[255, 255, 0]]
    assert mapping.unknown_ids(np.array([[-1, 65536, 300]])) == (-1, 65536)


def test_ids_that_no_file_can_have():
    with pytest.raises(ValueError, match=r"wide ids: the raw ids 65536 are not .* 0 to 65535"):
        LabelMapping("wide ids", {0: (65536,)}, ())
    with pytest.raises(ValueError, match=r"many ids: the train ids 255 are not .* 0 to 254"):
        LabelMapping("many ids", {255: (1,)}, ())


# ---------------------------------------------------------------- colors

THREE = LabelMapping("three ids", {0: (10,), 1: (300, 301)}, (7,))
GREEN, BLUE, WHITE = (0, 200, 0), (0, 0, 200), (255, 255, 255)
THREE_COLORS = ((10, GREEN), (300, BLUE), (301, BLUE), (7, WHITE))
IN_COLORS = LabelFormat(".png", THREE, "color", colors=THREE_COLORS)


def test_ids_of_colors(tmp_path):
    ids = np.random.default_rng(0).choice([10, 300, 7], (20, 30))
    rgb = np.zeros((20, 30, 3), np.uint8)
    for raw_id, color in ((10, GREEN), (300, BLUE), (7, WHITE)):
        rgb[ids == raw_id] = color
    save(tmp_path / "rgb.png", rgb)
    alpha = np.random.default_rng(1).integers(0, 256, (20, 30, 1), np.uint8)
    save(tmp_path / "rgba.png", np.concatenate([rgb, alpha], axis=-1))
    Image.fromarray(rgb).quantize(3).save(tmp_path / "palette.png", bits=2)
    Image.fromarray(rgb).save(tmp_path / "lossless.webp", lossless=True)
    for name in ("rgb.png", "rgba.png", "palette.png", "lossless.webp"):
        assert np.array_equal(labels.read_label(tmp_path / name, IN_COLORS), ids), name
    assert labels.read_label(tmp_path / "rgb.png", IN_COLORS).dtype == np.uint16
    expected = np.select([ids == 10, ids == 300], [0, 1], 255)
    assert np.array_equal(read_train_ids(tmp_path / "rgb.png", IN_COLORS, "mine"), expected)


def many_colors() -> LabelFormat:
    """Five ids whose colors are in no order."""
    colors = [(255, 0, 255), (3, 9, 200), (0, 255, 0), (250, 1, 0), (7, 7, 7)]
    mapping = LabelMapping("five ids", {i: (10 * i,) for i in range(5)}, ())
    return LabelFormat(
        ".png", mapping, "color", colors=tuple((10 * i, colors[i]) for i in range(5))
    )


def test_ids_of_colors_in_any_order(tmp_path):
    many = many_colors()
    ids = np.random.default_rng(0).integers(0, 5, (20, 30))
    path = save(tmp_path / "a.png", np.array([c for _, c in many.colors], np.uint8)[ids])
    assert np.array_equal(labels.read_label(path, many), 10 * ids)


def test_unknown_colors_are_ordered_by_their_number_of_pixels(tmp_path):
    rgb = np.full((10, 50, 3), 7, np.uint8)
    rgb[0, 10:15] = 255, 255, 255  # 5 pixels, one run
    rgb[1:9:2, 20] = 8, 8, 8  # 4 pixels, 4 runs
    rgb[2:9:2, 20] = 0, 9, 1  # as many: then by red, green and blue
    path = save(tmp_path / "a.png", rgb)
    with pytest.raises(ValueError, match="which no id of the five ids has") as error:
        labels.read_label(path, many_colors())
    found = "(255, 255, 255), (0, 9, 1), (8, 8, 8), which"
    assert f"2.6 % of its pixels have the colors {found}" in str(error.value)  # 13 of 500
    listed = "(255, 0, 255) (id 0), (3, 9, 200) (id 10), (0, 255, 0) (id 20), (250, 1, 0) (id 30)"
    assert f"allowed are {listed} and 1 more." in str(error.value)


def test_unknown_colors_of_one_pixel_are_ordered_by_red_green_and_blue(tmp_path):
    rgb = np.zeros((1, 200, 3), np.uint8)
    rgb[0, :, 1] = np.random.default_rng(0).permutation(200) + 10
    first = r"\(0, 10, 0\), \(0, 11, 0\), \(0, 12, 0\) and 197 more"
    with pytest.raises(ValueError, match=f"100 % of its pixels have the colors {first}"):
        labels.read_label(save(tmp_path / "a.png", rgb), many_colors())


def test_a_gray_file_of_a_format_with_colors(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of(np.ones((3, 5), int), 1))  # white
    assert labels.read_label(tmp_path / "a.png", IN_COLORS).tolist() == [[7] * 5] * 3


def test_unknown_colors_are_named_with_their_share(tmp_path):
    rgb = np.full((10, 10, 3), GREEN, np.uint8)
    rgb[0, :3] = 1, 200, 0  # almost green
    rgb[5, 5] = 9, 9, 9
    rgb[9, 9] = rgb[0, 0]
    with pytest.raises(
        ValueError, match=r"a\.png: 5 % .*\(1, 200, 0\), \(9, 9, 9\), which no id"
    ) as e:
        labels.read_label(save(tmp_path / "a.png", rgb), IN_COLORS)
    assert "allowed are (0, 200, 0) (id 10), (0, 0, 200) (id 300), (255, 255, 255) (id 7)" in str(
        e.value
    )


def test_lossy_colors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be lossless"):
        labels.read_label(save(tmp_path / "a.jpg", np.full((8, 8, 3), 255, np.uint8)), IN_COLORS)


@pytest.mark.parametrize(
    ("channel", "colors", "message"),
    [
        ("color", (), "its channel is 'color', so it needs `colors`"),
        (
            "color",
            ((10, BLUE), (300, BLUE)),
            r"ids of different classes have the color \(0, 0, 200",
        ),
        ("index", ((11, BLUE),), "the ids 11 have a color, but are not mapped"),
        ("index", ((10, (0, 0, 256)),), r"the colors \(0, 0, 256\) are not allowed"),
        ("index", ((10, (0, 0)),), r"the colors \(0, 0\) are not allowed"),
    ],
)
def test_formats_with_wrong_colors(channel, colors, message):
    with pytest.raises(ValueError, match=rf"label format '\.png', three ids: {message}"):
        LabelFormat(".png", THREE, channel, colors=colors)


# ---------------------------------------------------------------- palettes


def palette_png(path: Path, indices: np.ndarray, palette: list, **options) -> Path:
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(np.array(palette, np.uint8).tobytes())
    image.save(path, **options)
    with Image.open(path) as stored:
        assert stored.mode == "P"
    return path


def reordered(ids: np.ndarray, color_of: dict, rng) -> tuple[np.ndarray, list]:
    """Indices and palette of the colors of `ids` alone, in another order."""
    used = sorted({color_of[i] for i in np.unique(ids).tolist()})
    palette = [used[i] for i in rng.permutation(len(used))]
    return np.vectorize(lambda i: palette.index(color_of[i]))(ids), palette


def grays(values) -> list:
    return [(v, v, v) for v in values]


@pytest.mark.parametrize("bits", [8, 4])
def test_gray_values_stored_with_a_palette(tmp_path, bits):
    train_ids = LabelFormat(".png", get_dataset("bdd_val", tmp_path).label_formats[0].ids)
    values = np.array([255, 13, 0, 18, 5])
    ids = np.random.default_rng(0).choice(values, (9, 13))
    indices = np.vectorize(values.tolist().index)(ids)
    path = palette_png(tmp_path / "a.png", indices, grays(values), bits=bits)
    assert np.array_equal(labels.read_label(path, train_ids), ids)
    path = palette_png(tmp_path / "b.png", indices, grays(values), bits=bits, transparency=1)
    assert np.array_equal(labels.read_label(path, train_ids), ids)


@pytest.mark.parametrize("length", [19, 256])
def test_palettes_of_gray_values_that_are_their_index(tmp_path, length):
    ids = np.random.default_rng(0).integers(0, 19, (9, 13))
    assert np.array_equal(
        read_label(palette_png(tmp_path / "a.png", ids, grays(range(length)))), ids
    )


@pytest.mark.parametrize("padding", [0, 254])
def test_black_and_white_palettes(tmp_path, padding):
    """0 and 255, or 0 and 1 shown as black and white."""
    indices = np.array([[0, 1, 1]])
    bits = 8 if padding else 1
    path = palette_png(tmp_path / "a.png", indices, grays([0, 255] + [0] * padding), bits=bits)
    both = LabelFormat(".png", LabelMapping("two classes", {0: (0,), 1: (1,)}, (255,)))
    with pytest.raises(ValueError, match=r"a\.png: its palette has only grays, and both its gray "):
        labels.read_label(path, both)
    classes = LabelFormat(".png", LabelMapping("two classes", {0: (0,), 1: (1,)}, ()))
    assert labels.read_label(path, classes).tolist() == [[0, 1, 1]]
    white = LabelFormat(".png", LabelMapping("white", {0: (0,), 1: (255,)}, ()))
    assert labels.read_label(path, white).tolist() == [[0, 255, 255]]


@pytest.mark.parametrize(
    "values", [[0, 128, 255], [0, 127, 255], [0, 85, 170, 255], [0, 42, 85, 127, 170, 212, 255]]
)
def test_indices_that_are_shown_as_grays(tmp_path, values):
    indices = np.arange(len(values))[None]
    path = palette_png(tmp_path / "a.png", indices, grays(values))
    few = LabelFormat(".png", LabelMapping("few", {0: tuple(range(len(values)))}, ()))
    assert labels.read_label(path, few).tolist() == indices.tolist()


def test_grays_that_are_published_colors(tmp_path):
    """Ids of Mapillary that are also the gray of other ids: (40, 40, 40) is id 39."""
    mapillary = get_dataset("mapillary_val", tmp_path).label_formats[-1]
    path = palette_png(tmp_path / "a.png", np.array([[0, 1]]), grays([40, 33]))
    # both readings are of ignored ids, so it does not matter
    assert (read_train_ids(path, mapillary, "mapillary_val") == 255).all()
    colors = ((13, (40, 40, 40)), (17, (33, 33, 33)))
    other = LabelFormat(".png", mapillary.ids, colors=colors)
    with pytest.raises(ValueError, match="both its gray values and its published colors are poss"):
        labels.read_label(path, other)
    path = palette_png(tmp_path / "b.png", np.array([[0, 1]]), grays([70, 153]))
    assert labels.read_label(path, mapillary).tolist() == [[17, 45]]  # building, pole


def test_gray_values_that_are_no_ids(tmp_path):
    path = palette_png(tmp_path / "a.png", np.array([[0, 1]]), grays([3, 77]))
    with pytest.raises(ValueError, match=r"a\.png: contains the ids 77, which are not among"):
        read_train_ids(path, get_dataset("bdd_val", tmp_path).label_formats[0], "bdd_val")


CITYSCAPES = {label.id: label.color for label in cityscapes_labels if label.id >= 0}


def test_the_published_colors_of_cityscapes(tmp_path):
    (label_format,) = [f for f in get_dataset("cityscapes_val", tmp_path).label_formats if f.colors]
    assert dict(label_format.colors) == CITYSCAPES
    gta = get_dataset("gta5", tmp_path).label_formats[-1]
    license_plate = next(label for label in cityscapes_labels if label.name == "license plate")
    assert dict(gta.colors) == {**CITYSCAPES, 34: license_plate.color}


@pytest.mark.parametrize("padding", [0, 221])
def test_original_palette_files_are_read_by_index(tmp_path, padding):
    """GTA5's labels: every id has its color, also those that share one."""
    gta = get_dataset("gta5", tmp_path).label_formats[-1]
    ids = np.random.default_rng(0).integers(0, 35, (40, 50))
    palette = [*CITYSCAPES.values(), (0, 0, 142)] + [(0, 0, 0)] * padding
    path = palette_png(tmp_path / "a.png", ids, palette)
    read = labels.read_label(path, gta)
    assert read.dtype == np.uint8
    assert np.array_equal(read, ids)


@pytest.mark.parametrize("name", ["cityscapes_val", "mapillary_val"])
def test_reordered_palettes_are_read_by_their_colors(tmp_path, name):
    label_format = get_dataset(name, tmp_path).label_formats[-1]
    colors = dict(label_format.colors)
    ids = np.array(sorted(set(colors) - {17, 18} if name == "cityscapes_val" else set(colors)))
    rng = np.random.default_rng(3)
    ids = rng.choice(ids, (30, 40))
    indices, palette = reordered(ids, colors, rng)
    read = labels.read_label(palette_png(tmp_path / "a.png", indices, palette), label_format)
    # ids of the same color are all ignored
    assert np.array_equal(label_format.ids.apply(read), label_format.ids.apply(ids))
    assert np.array_equal(read[read > 4], ids[ids > 4])


def test_mapillarys_colors_differ(tmp_path):
    colors = get_dataset("mapillary_val", tmp_path).label_formats[-1].colors
    assert [i for i, _ in colors] == list(range(66))
    assert len({color for _, color in colors}) == 66
    # some entries of its config file
    assert dict(colors)[13] == (128, 64, 128) and dict(colors)[55] == (0, 0, 142)
    assert dict(colors)[5] == (90, 120, 150) and dict(colors)[65] == (0, 0, 0)


def test_reordered_palettes_with_a_color_of_two_classes(tmp_path):
    gta = get_dataset("gta5", tmp_path).label_formats[-1]
    path = palette_png(tmp_path / "a.png", np.array([[0, 1]]), [(0, 0, 142), (128, 64, 128)])
    with pytest.raises(
        ValueError, match=r"a\.png: .* \(0, 0, 142\) is the color of the ids 26, 34"
    ):
        labels.read_label(path, gta)


def test_palettes_with_published_and_other_colors(tmp_path):
    gta = get_dataset("gta5", tmp_path).label_formats[-1]
    palette = [(9, 8, 7)] * 7 + [(128, 64, 128), (1, 2, 3), (119, 11, 32)]
    # the road is at its index 7, and 8 has a color that no id has
    ids = np.array([[7, 8, 7]])
    path = palette_png(tmp_path / "own.png", ids, palette)
    assert np.array_equal(labels.read_label(path, gta), ids)
    # the bicycle is not at its index 33
    path = palette_png(tmp_path / "mixed.png", np.array([[7, 8, 9]]), palette)
    with pytest.raises(
        ValueError, match=r"mixed\.png: the color \(119, 11, 32\) .* index 9, but bel"
    ):
        labels.read_label(path, gta)


def test_palettes_with_a_color_twice_were_not_reordered(tmp_path):
    """Such as those of Mapillary's version 1.1: a barrier has the color of a wall, id 6."""
    mapillary = get_dataset("mapillary_val", tmp_path).label_formats[-1]
    palette = [color for _, color in mapillary.colors]
    palette[5] = palette[6]
    path = palette_png(tmp_path / "a.png", np.array([[5, 13]]), palette)
    with pytest.raises(
        ValueError, match=r"index 5, but belongs to id 6, and its palette has a color"
    ):
        labels.read_label(path, mapillary)


def test_an_index_without_a_color(tmp_path):
    gta = get_dataset("gta5", tmp_path).label_formats[-1]
    path = tmp_path / "a.png"
    path.write_bytes(png_of(np.array([[0, 1, 2]]), 8, bytes([0, 0, 142, 128, 64, 128])))
    with pytest.raises(ValueError, match="index 2, but the palette has 2 colors"):
        labels.read_label(path, gta)


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tif"])
def test_palettes_of_other_formats(tmp_path, suffix):
    mapillary = get_dataset("mapillary_val", tmp_path).label_formats[-1]
    palette = [(0, 0, 142), (128, 64, 128), (70, 70, 70)]
    path = palette_png(tmp_path / f"a.{suffix}", np.array([[0, 1, 2]]), palette)
    assert labels.read_label(path, mapillary).tolist() == [[55, 13, 17]]


def test_a_palette_with_alpha(tmp_path):
    """A TGA file of 2x1 pixels, written by hand; its palette has blue, green, red and alpha."""
    mapillary = get_dataset("mapillary_val", tmp_path).label_formats[-1]
    head = struct.pack("<3BHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 2, 1, 8, 0x20)
    palette = bytes([142, 0, 0, 255, 128, 64, 128, 255])
    (tmp_path / "a.tga").write_bytes(head + palette + bytes([0, 1]))
    assert labels.read_label(tmp_path / "a.tga", mapillary).tolist() == [[55, 13]]
