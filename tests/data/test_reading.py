"""Decoding of image and label files of all formats, and of broken ones."""

from __future__ import annotations

import io
import logging
import random
import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from dataset_files import ANY_IDS, random_image, save, save_palette, save_synthia
from PIL import Image, ImageFile, PngImagePlugin

from clouds.data import image_files, labels, reading
from clouds.data.labels import LabelFormat
from clouds.data.reading import DamagedImageError, read_image, read_size

ORIENTATION = 0x0112

pytestmark = pytest.mark.usefixtures("decoder")


def read_label(path: Path, channel: labels.Channel = "index") -> np.ndarray:
    return labels.read_label(path, LabelFormat("", ANY_IDS, channel))


def png(
    size: tuple[int, int],
    color: int,
    pixels: bytes,
    interlaced=False,
    after=(),
    *,
    before=(),
    depth=8,
    parts=None,
) -> bytes:
    """A PNG file, written by hand; `pixels` with a 0 before each row, or compressed in `parts`."""
    head = struct.pack(">IIBBBBB", size[1], size[0], depth, color, 0, 0, interlaced)
    data = [(b"IDAT", part) for part in parts or [zlib.compress(pixels)]]
    chunks = [(b"IHDR", head), *before, *data, *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def smooth(height: int = 40, width: int = 60) -> np.ndarray:
    """An image that lossy compression hardly changes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)


def max_difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ---------------------------------------------------------------- images


def test_color_png(tmp_path):
    colors = random_image(0)
    read = read_image(save(tmp_path / "a.png", colors))
    assert read.dtype == np.uint8
    assert np.array_equal(read, colors)


def test_jpeg_has_channel_order_rgb(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(smooth()).save(path, quality=98)
    assert max_difference(read_image(path), smooth()) < 12


def test_gray_png(tmp_path):
    gray = random_image(0)[..., 0]
    read = read_image(save(tmp_path / "a.png", gray))
    assert np.array_equal(read, np.repeat(gray[..., None], 3, axis=2))


def test_palette_png_is_converted_to_its_colors(tmp_path):
    colors = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 7]], np.uint8)
    ids = np.random.default_rng(0).integers(0, 3, (9, 11)).astype(np.uint8)
    image = Image.fromarray(ids)
    image.putpalette(colors.tobytes())
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), colors[ids])


@pytest.mark.parametrize("extra", ["RGBA", "LA"])
def test_alpha_is_dropped(tmp_path, extra):
    colors = random_image(0)
    if extra == "LA":
        colors = np.repeat(colors[..., :1], 3, axis=2)
    image = Image.fromarray(colors)
    image = image.convert("L").convert("LA") if extra == "LA" else image.convert("RGBA")
    image.putalpha(Image.fromarray(random_image(1)[..., 0]))
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == extra
    assert np.array_equal(read_image(tmp_path / "a.png"), colors)


def test_sixteen_bit_png_keeps_the_high_byte(tmp_path):
    colors = random_image(0)
    deep = colors[..., ::-1].astype(np.uint16) * 256 + 99
    assert cv2.imwrite(str(tmp_path / "a.png"), deep)
    assert max_difference(read_image(tmp_path / "a.png"), colors) <= 1


def test_cmyk_jpeg(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", None)  # it converts to other colors than image viewers
    path = tmp_path / "a.jpg"
    Image.fromarray(smooth()).convert("CMYK").save(path, quality=98)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
        assert np.array_equal(read_image(path), np.array(stored.convert("RGB")))
    assert max_difference(read_image(path), smooth()) < 12


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    # the eight orientations of the EXIF standard
    stored = smooth()
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(stored, 1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, quality=98)
    assert max_difference(read_image(path), upright) < 12
    assert read_size(path) == upright.shape[:2]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_without_orientation(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0131] = "a program"  # the tag `Software`
    Image.fromarray(smooth()).save(tmp_path / f"a.{suffix}", exif=exif, quality=98)
    assert max_difference(read_image(tmp_path / f"a.{suffix}"), smooth()) < 12
    assert read_size(tmp_path / f"a.{suffix}") == smooth().shape[:2]


def test_exif_orientation_after_the_pixels(tmp_path):
    stored = random_image(0, (5, 7))
    rows = b"".join(b"\0" + row.tobytes() for row in stored)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    (tmp_path / "a.png").write_bytes(png((5, 7), 2, rows, after=[(b"eXIf", body)]))
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(stored, -1))


def test_exif_orientation_before_many_pixels(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    stored = random_image(0, (200, 300))
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert (tmp_path / "a.png").stat().st_size > 170_000  # of random bytes
    assert np.array_equal(read_image(tmp_path / "a.png"), stored[::-1, ::-1])


@pytest.mark.parametrize("color", [0, 2])
def test_interlaced_png(tmp_path, color):
    stored = random_image(0, (2, 2)) if color == 2 else random_image(0, (2, 2))[..., 0]
    # Adam7 stores a 2x2 image as its corner, the pixel next to it, and the second row
    rows = (stored[:1, :1], stored[:1, 1:], stored[1:])
    data = png((2, 2), color, b"".join(b"\0" + row.tobytes() for row in rows), interlaced=True)
    (tmp_path / "a.png").write_bytes(data)
    read = read_image if color == 2 else read_label
    assert np.array_equal(read(tmp_path / "a.png"), stored)


def test_common_png_files_use_the_fast_decoder(tmp_path, decoder, monkeypatch):
    ids = random_image(1)[..., 0]
    image = save(tmp_path / "a.png", random_image(0))
    labels = [save(tmp_path / "b.png", ids), save_palette(tmp_path / "c.png", ids)]
    if decoder == "fast":  # the other decoders must not be called
        monkeypatch.setattr(cv2, "imdecode", None)
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert np.array_equal(read_image(image), random_image(0))
    assert all(np.array_equal(read_label(label), ids) for label in labels)


def test_complete_png_and_jpeg_files_do_not_use_the_slow_decoder(tmp_path, monkeypatch):
    gray = random_image(0)[..., 0]
    save(tmp_path / "gray.png", gray)
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", quality=98)
    (tmp_path / "zeros.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + bytes(64))
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert np.array_equal(read_image(tmp_path / "gray.png")[..., 0], gray)
    for name in ("a.jpg", "zeros.jpg"):
        assert max_difference(read_image(tmp_path / name), smooth()) < 12


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tiff"])
def test_other_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(smooth()).save(path, quality=98)
    assert max_difference(read_image(path), smooth()) < 20


def test_zeros_after_the_end_of_a_jpeg_are_ignored(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(smooth()).save(path, quality=98)
    path.write_bytes(path.read_bytes() + bytes(64))
    assert max_difference(read_image(path), smooth()) < 12


# ---------------------------------------------------------------- large files


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("kind", ["text", "compressed text", "color profile"])
def test_large_metadata(tmp_path, kind, mode):
    """Pillow refuses texts and profiles of more than 1 MiB."""
    image = Image.fromarray(random_image(0)).convert(mode)
    info, options = PngImagePlugin.PngInfo(), {}
    if kind == "color profile":
        options["icc_profile"] = random.Random(0).randbytes(2 << 20)
    else:
        info.add_itxt("Comment", "0123456789" * 200_000, zip=kind == "compressed text")
    path = tmp_path / "a.png"
    image.save(path, pnginfo=info, **options)
    assert np.array_equal(read_image(path), np.array(image.convert("RGB")))
    assert read_size(path) == image.size[::-1]
    if mode != "RGB":
        assert np.array_equal(read_label(path, "red"), np.array(image))


def test_damage_in_large_metadata_is_seen(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "0123456789" * 200)
    path = tmp_path / "a.png"
    Image.fromarray(random_image(0)).save(path, pnginfo=info)
    data = bytearray(path.read_bytes())
    data[data.index(b"012345")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="chunk b'tEXt' at byte"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_the_limit_of_pixels(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(smooth(30, 40)).save(path, quality=98)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of Pillow; it is not used
    monkeypatch.setenv("CLOUDS_MAX_IMAGE_PIXELS", "1200")
    assert max_difference(read_image(path), smooth(30, 40)) < 12
    assert read_size(path) == (30, 40)
    monkeypatch.setenv("CLOUDS_MAX_IMAGE_PIXELS", "1199")
    with pytest.raises(
        ValueError, match=rf"a\.{suffix}: the image has 40x30 = 1200 .* allowed are 11"
    ) as e:
        read_image(path)
    assert "CLOUDS_MAX_IMAGE_PIXELS=1200 to read it, which takes 1 MiB of memory" in str(e.value)
    assert "again" not in str(e.value)
    for wrong in ("many", "0", "-1"):
        monkeypatch.setenv("CLOUDS_MAX_IMAGE_PIXELS", wrong)
        with pytest.raises(ValueError, match=f"CLOUDS_MAX_IMAGE_PIXELS is '{wrong}', but must be"):
            read_image(path)


def test_formats_of_which_pillow_limits_the_pixels(tmp_path, monkeypatch):
    path = tmp_path / "a.webp"
    Image.fromarray(smooth(30, 40)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(
        ValueError, match=r"a\.webp: Pillow reads .* PIL\.Image\.MAX_IMAGE_PIXELS\.$"
    ):
        read_image(path)


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_images_wider_than_opencv_reads(tmp_path, color, channels, capfd):
    width = (1 << 20) + 5
    row = np.resize(np.arange(250, dtype=np.uint8), width * channels)
    (tmp_path / "a.png").write_bytes(png((1, width), color, b"\0" + row.tobytes()))
    stored = row.reshape(1, width, channels)
    expected = np.repeat(stored, 3, axis=2) if color == 0 else stored[..., :3]
    assert np.array_equal(read_image(tmp_path / "a.png"), expected)
    assert read_size(tmp_path / "a.png") == (1, width)
    assert np.array_equal(read_label(tmp_path / "a.png", "red"), stored[..., 0])
    assert capfd.readouterr().err == ""


def test_a_label_that_no_decoder_reads(tmp_path):
    width = (1 << 20) + 5
    data = bytearray(png((1, width), 2, bytes(1 + 6 * width)))
    data[24] = 16  # bits
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    assert read_image(tmp_path / "a.png").shape == (1, width, 3)
    with pytest.raises(ValueError, match=r"a\.png: OpenCV cannot decode .* in one channel\.$"):
        read_label(tmp_path / "a.png", "red")


def test_jpegs_wider_than_decoders_read(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("L", (65500, 1), 9).save(path)
    assert (read_image(path) == 9).all()
    data = bytearray(path.read_bytes())
    width = data.index(b"\xff\xc0") + 7  # after length, depth and height
    data[width : width + 2] = struct.pack(">H", 65501)
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"has 65501x1 pixels, but decoders .* 65500 .*as PNG"
    ) as e:
        read_image(path)
    assert "again" not in str(e.value)


# ---------------------------------------------------------------- missing or broken files


def encoded(format_: str, array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format_)
    return buffer.getvalue()


@pytest.mark.parametrize("reader", [read_image, read_label, read_size])
def test_missing_file(tmp_path, reader):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        reader(tmp_path / "nowhere.png")


@pytest.mark.parametrize("reader", [read_image, read_label, read_size])
@pytest.mark.parametrize(
    "content", [b"", b"no", b"this is a text file, not an image\n" * 20, b"\x89PNG\r\n\x1a\n"]
)
def test_a_file_that_is_not_an_image(tmp_path, reader, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read as an image: (?!None)"):
        reader(path)


def test_an_empty_file_is_reported_as_empty(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"image: the file is empty \(0 bytes\)\. Download"):
        read_image(tmp_path / "a.png")


def test_the_first_bytes_of_another_file_are_reported(tmp_path):
    (tmp_path / "a.png").write_bytes(b"this is a text file")
    with pytest.raises(ValueError, match=r"no image format begins with b'this is '\. Download"):
        read_image(tmp_path / "a.png")


def test_few_bytes(tmp_path):
    for content in (b"B", b"no", b"\xff\xd8", b"II*"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"no image format begins with b'.*'\. Download"):
            read_image(tmp_path / "a.png")


def test_folder_with_the_name_of_an_image(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ValueError, match=r"a\.png.*folder"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_truncated_image(tmp_path, format_, share):
    data = encoded(format_, random_image(0, (64, 64)))
    path = tmp_path / "truncated.img"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"truncated\.img: cannot be read.*again"):
        read_image(path)


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_truncated_image_when_opencv_fills_missing_pixels(tmp_path, format_, monkeypatch):
    # as its versions before 5 do
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: random_image(0, (64, 64)))
    path = tmp_path / "truncated.img"
    path.write_bytes(encoded(format_, random_image(0, (64, 64)))[:-500])
    with pytest.raises(ValueError, match=r"truncated\.img: cannot be read"):
        read_image(path)


@pytest.mark.parametrize("format_", ["gray", "palette", "synthia"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_truncated_label(tmp_path, format_, share):
    ids = np.random.default_rng(0).integers(0, 23, (64, 64)).astype(np.uint8)
    save_as = {"gray": save, "palette": save_palette, "synthia": save_synthia}[format_]
    data = save_as(tmp_path / "whole.png", ids).read_bytes()
    path = tmp_path / "truncated.png"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"truncated\.png: cannot be read"):
        read_label(path, "red" if format_ == "synthia" else "index")


@pytest.mark.parametrize("reader", [read_image, read_label])
def test_damaged_png(tmp_path, reader):
    data = bytearray(encoded("PNG", random_image(0, (64, 64))[..., 0]))
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read"):
        reader(tmp_path / "a.png")


@pytest.mark.parametrize("color", [0, 2, 6])
def test_a_whole_png_without_pixels(tmp_path, color):
    """Its chunks match their CRC, but there is nothing in them."""
    (tmp_path / "a.png").write_bytes(png((4, 4), color, b""))
    for reader in (read_image, lambda path: read_label(path, "red")):
        with pytest.raises(ValueError, match=r"/a\.png: cannot be read as an image: (?!None)"):
            reader(tmp_path / "a.png")


def adam7_rows(pixels: np.ndarray, depth: int) -> bytes:
    """The rows of an interlaced PNG as its specification tells; `pixels` (H, W, values)."""
    # the table of the specification: which of the seven passes has a pixel of each 8x8 block
    places = ["16462646", "77777777", "56565656", "77777777"]
    places += ["36463646", "77777777", "56565656", "77777777"]
    height, width = pixels.shape[:2]
    table = np.array([[int(c) for c in row] for row in places])
    at = table[np.arange(height) % 8][:, np.arange(width) % 8]
    rows = [
        pixels[y, at[y] == number]
        for number in range(1, 8)
        for y in range(height)
        if (at[y] == number).any()
    ]
    return b"".join(b"\0" + packed(row, depth) for row in rows)


def packed(row: np.ndarray, depth: int) -> bytes:
    """Values of a row, each of `depth` bits, the first of them in the highest bits."""
    bits = "".join(f"{value:0{depth}b}" for value in row.ravel())
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


KINDS = [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 3), (2, 3), (4, 3), (8, 3)]
KINDS += [(8, 2), (16, 2), (8, 4), (8, 6)]


def png_of(depth: int, color: int, interlaced: bool, size=(9, 13)) -> tuple[np.ndarray, bytes]:
    """Random values (H, W, channels), none of them 0, and the rows of a PNG with them."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    values = np.random.default_rng(0).integers(1, 2**depth, (*size, channels))
    if interlaced:
        return values, adam7_rows(values, depth)
    return values, b"".join(b"\0" + packed(row, depth) for row in values)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("depth", "color"), KINDS)
def test_a_whole_png_with_too_few_rows(tmp_path, depth, color, interlaced):
    """Its chunks match their CRC and the stream its checksum; Pillow makes the other pixels 0."""
    values, rows = png_of(depth, color, interlaced)
    path = tmp_path / "a.png"

    def write(pixels: bytes) -> None:
        palette = [(b"PLTE", bytes(range(256)) * 3)] if color == 3 else []
        path.write_bytes(png((9, 13), color, pixels, interlaced, before=palette, depth=depth))

    write(rows)
    reads_label = color != 4
    assert read_image(path).shape == (9, 13, 3)
    if reads_label and depth < 16:
        assert np.array_equal(
            read_label(path, "index" if color in (0, 3) else "red"), values[..., 0]
        )
    last = len(rows) - (1 + -(-13 * depth * values.shape[2] // 8))
    for number in {len(rows) // 2, last, len(rows) - 1}:
        write(rows[:number])
        for reader in (
            read_image,
            *([lambda path: read_label(path, "red")] if reads_label else []),
        ):
            with pytest.raises(ValueError, match=r"/a\.png: cannot be read .* again; "):
                reader(path)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 2), (5, 5), (8, 8), (17, 4)])
def test_the_number_of_bytes_of_a_png(tmp_path, size, interlaced):
    path = tmp_path / "a.png"
    _, rows = png_of(4, 0, interlaced, size)
    image_files.require_all_rows(png(size, 0, rows, interlaced, depth=4))
    with pytest.raises(
        ValueError, match=rf"holds {len(rows) - 1} of the {len(rows)} bytes of its pixels"
    ):
        image_files.require_all_rows(png(size, 0, rows[:-1], interlaced, depth=4))
    path.write_bytes(png(size, 0, rows + bytes(50), interlaced, depth=4))  # more is not less
    assert read_image(path).shape == (*size, 3)


def test_rows_of_zeros_are_no_missing_rows(tmp_path):
    """Also in several chunks, and of a stream that zlib writes in far fewer bytes."""
    ids = np.zeros((500, 700), np.uint8)
    ids[:3] = 7
    path = tmp_path / "a.png"
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in ids))
    data = png((500, 700), 0, b"", parts=[rows[:9], b"", rows[9:30], rows[30:]])
    path.write_bytes(data)
    image_files.require_all_rows(data)
    assert np.array_equal(read_label(path), ids)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (12, "the PNG ends without its last chunk, after {} bytes"),
        (5, "the PNG ends without its last chunk, after {} bytes"),
        (4, "chunk b'IEND' at byte {} of the PNG is truncated"),
        (1, "chunk b'IEND' at byte {} of the PNG is truncated"),
    ],
)
def test_a_png_without_all_of_its_last_chunk(tmp_path, missing, reason):
    """The last chunk has 12 bytes: 4 of its length, 4 of its name, no content, 4 of its CRC."""
    data = png((1, 1), 0, b"\0\7")
    (tmp_path / "a.png").write_bytes(data[:-missing])
    number = len(data) - (missing if "after" in reason else 12)
    with pytest.raises(ValueError, match=re.escape(reason.format(number))):
        read_image(tmp_path / "a.png")


def test_size_is_read_from_the_header_alone(tmp_path):
    data = encoded("PNG", random_image(0, (64, 50)))
    (tmp_path / "a.png").write_bytes(data[:300])
    assert read_size(tmp_path / "a.png") == (64, 50)


def test_nothing_is_logged_for_a_valid_file(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, logger="clouds"):
        read_image(save(tmp_path / "a.png", random_image(0)))
    assert not caplog.records


def chunks(data: bytes) -> list[tuple[str, int, int]]:
    """Name, start of the content and length of every chunk of a PNG."""
    found, start = [], 8
    while start < len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        found.append((data[start + 4 : start + 8].decode(), start + 8, length))
        start += 12 + length
    return found


def label_png(kind: str) -> tuple[bytes, np.ndarray]:
    """A label file with several chunks besides the pixels, and its ids."""
    ids = np.random.default_rng(0).integers(0, 19, (200, 300)).astype(np.uint8)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "made by hand")
    image = Image.fromarray(ids if kind != "rgb" else np.repeat(ids[..., None], 3, axis=2))
    if kind == "palette":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text, dpi=(72, 72))
    if kind == "16 bits":
        buffer = io.BytesIO(cv2.imencode(".png", ids.astype(np.uint16))[1].tobytes())
    return buffer.getvalue(), ids


@pytest.mark.parametrize("kind", ["gray", "palette", "rgb", "16 bits"])
def test_a_png_whose_chunk_fails_its_crc_is_never_decoded(tmp_path, kind):
    """Each chunk with another byte in its content or CRC; OpenCV and Pillow let some of them pass.

    Every decoder is in the test: the fast one, OpenCV (16 bits, color) and Pillow.
    """
    data, ids = label_png(kind)
    path = tmp_path / "label.png"
    path.write_bytes(data)
    assert np.array_equal(read_label(path), ids)
    found = chunks(data)
    assert {name for name, *_ in found} >= {"IHDR", "IDAT", "IEND"}
    for name, start, length in found:
        for position in {start, start + length // 2, start + length, start + length + 3}:
            damaged = bytearray(data)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            for reader in (read_label, read_image):
                with pytest.raises(ValueError, match=rf"label\.png: .*chunk b'{name}' at byte"):
                    reader(path)


def test_label_files_with_holes_are_refused(tmp_path):
    data, _ = label_png("gray")
    rng = random.Random(0)
    path = tmp_path / "label.png"
    for _ in range(200):
        size = rng.choice([1, 64, 4096])
        start = rng.randrange(len(data) - size)
        filling = rng.choice([bytes(size), rng.randbytes(size)])
        if data[start : start + size] == filling:
            continue
        path.write_bytes(data[:start] + filling + data[start + size :])
        with pytest.raises(ValueError, match=r"label\.png: cannot be read"):
            read_label(path)


def damaged_jpeg(mode: str = "RGB") -> bytes:
    """A JPEG with zeros in its compressed data; libjpeg warns and decodes it."""
    buffer = io.BytesIO()
    Image.fromarray(random_image(0, (64, 96))).convert(mode).save(buffer, "JPEG", quality=90)
    data = bytearray(buffer.getvalue())
    data[-1500:-1000] = bytes(500)
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_damaged_jpeg_data_is_an_error_or_one_warning(tmp_path, mode, caplog, capfd):
    path = tmp_path / f"{mode}.jpg"
    path.write_bytes(damaged_jpeg(mode))
    reading._warn_once.cache_clear()
    cv2.imread(str(path))
    assert "Corrupt JPEG data" in capfd.readouterr().err  # libjpeg's own words, by OpenCV
    with pytest.raises(DamagedImageError, match=rf"{mode}\.jpg: .*damaged \(Corrupt JPEG data"):
        read_image(path, strict=True)
    assert read_image(path).shape == read_image(path).shape == (64, 96, 3)
    (message,) = caplog.messages
    assert f"{mode}.jpg: its JPEG data is damaged (Corrupt JPEG data" in message
    assert capfd.readouterr().err == ""


def jpeg_with_restart_markers() -> tuple[bytes, list[int]]:
    """A JPEG with a restart marker after each row of blocks, and where these are."""
    buffer = io.BytesIO()
    image = Image.fromarray(random_image(0, (64, 96)))
    image.save(buffer, "JPEG", quality=90, restart_marker_rows=1)
    data = buffer.getvalue()
    found = [i for i in range(len(data)) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    assert len(found) == 3  # 4 rows of blocks of 16 pixels
    return data, found


@pytest.mark.parametrize("damage", ["no marker", "no row", "scan ends", "wrong code"])
def test_damage_of_jpegs_that_is_noticed(tmp_path, damage):
    data, (first, second, _) = jpeg_with_restart_markers()
    damaged = {
        "no marker": data[:first] + data[first + 2 :],
        "no row": data[:first] + data[second:],
        "scan ends": data[:second] + b"\xff\xd9",
        "wrong code": data[:first] + b"\xff\xd6" + data[first + 2 :],
    }[damage]
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    read_image(path, strict=True)
    path.write_bytes(damaged)
    with pytest.raises(DamagedImageError, match=r"a\.jpg: its JPEG data is damaged \("):
        read_image(path, strict=True)
    assert read_image(path).shape == (64, 96, 3)


def test_damage_of_a_jpeg_with_a_preview(tmp_path):
    """MPO files of cameras are JPEG files with further images."""
    path = tmp_path / "a.jpg"
    first, second = (Image.fromarray(random_image(i, (64, 96))) for i in (0, 1))
    first.save(path, "MPO", save_all=True, append_images=[second], quality=90)
    with Image.open(path) as stored:
        assert max_difference(read_image(path, strict=True), np.array(stored)) <= 1
    data = bytearray(path.read_bytes())
    end = data.index(b"\xff\xd9\xff\xd8")
    data[end - 900 : end - 400] = bytes(500)
    path.write_bytes(data)
    with pytest.raises(DamagedImageError, match=r"a\.jpg: its JPEG data is damaged \("):
        read_image(path, strict=True)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_have_the_pixels_of_opencv(tmp_path, progressive, subsampling, mode):
    path = tmp_path / "a.jpg"
    image = Image.fromarray(random_image(0, (61, 97))).convert(mode)
    image.save(path, quality=85, progressive=progressive, subsampling=subsampling)
    expected = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert np.array_equal(read_image(path, strict=True), expected)


@pytest.mark.parametrize("pixel", [None, (0, 0), (0, 1), (1, 0), (3, 4)])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_images_of_one_color(pixel, channel):
    image = np.full((4, 5, 3), (9, 0, 254), np.uint8)
    if pixel is not None:
        image[pixel][channel] += 1
    assert reading.is_one_color(image) == (pixel is None)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1)])
def test_images_of_one_color_and_one_row_or_column(size):
    assert reading.is_one_color(np.full((*size, 3), (9, 0, 255), np.uint8))


@pytest.mark.parametrize("orientation", [0, 9, 262, 65535])
def test_an_orientation_that_is_none_turns_nothing(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (13, 9)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (9, 13, 3)
    assert read_size(tmp_path / "a.jpg") == (9, 13)


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"])
def test_names_that_no_file_can_have(name):
    for read in (read_image, read_label):
        with pytest.raises(ValueError, match=r"image .*no file can have this name"):
            read(Path(name))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_size(Path(name))
