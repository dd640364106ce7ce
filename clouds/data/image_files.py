"""Opening of image files: their format, and whether they are complete, lossless, not too large.

A PNG has a CRC-32 per chunk: all are checked before any decoder sees the file. A decoder may fill
missing pixels with gray, so a file without its end marker is first decoded by Pillow, which is
strict. But Pillow fills rows that a whole PNG lacks with zeros, which other decoders refuse.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

PIXELS_VARIABLE = "CLOUDS_MAX_IMAGE_PIXELS"
"""Environment variable: the largest number of pixels that an image file may have."""

DEFAULT_MAX_PIXELS = 1 << 29
"""32768 x 16384; 1.6 GB as RGB. More is refused, so that a damaged or malicious header does not
fill the memory."""

JPEG_FORMATS = ("JPEG", "MPO")
"""Pillow's names; the second one is a JPEG with further images, such as a preview."""

MAX_JPEG_SIDE = 65500
"""Pixels; a limit of libjpeg, in every decoder."""

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises when the content of a file does not agree with its header."""

PNG_HEADER = struct.Struct(">12x4sII5B")
"""First chunk of a PNG: its name, width, height, depth, color type, …, interlacing."""

_LOSSLESS_FORMATS = ("PNG", "BMP", "DIB", "GIF", "PPM", "TGA", "PCX", "SGI")
_LOSSLESS_TIFF = (
    *("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd"),
    *("tiff_ccitt", "group3", "group4"),
)
_TIFF_DEPTH = 258
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = struct.Struct(">I4s")  # length of the content, name
_PNG_END = b"IEND\xaeB`\x82"
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Color type of a PNG -> values per pixel."""

_ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)),
    (0, 1, 1, 2),
)
"""First column and row, and steps, of the seven passes of an interlaced PNG."""

_INFLATED = 1 << 16  # bytes at a time
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_SMALL_METADATA = 1000  # bytes; zlib expands them to less than Pillow's limit of 1 MiB
_JPEG_END = b"\xff\xd9"


def open_image_file(path: Path, lossless: bool = False) -> tuple[bytes, Image.Image]:
    """The bytes of a complete image file, and a Pillow image that has only read the header.

    Of a PNG, without large texts and color profiles.

    Args:
        path: its file.
        lossless: refuse formats whose compression may have changed pixels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, truncated, too large, fails its checksums or is not an image.
    """
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        raise ValueError(f"{path}: expected an image file, but this is a folder") from error
    except ValueError as error:  # the character 0, or half a surrogate pair
        raise ValueError(f"image {str(path)!r}: no file can have this name: {error}") from error
    if not data:
        raise broken(path, "the file is empty (0 bytes)")
    try:
        if data.startswith(_PNG_SIGNATURE):  # no decoder checks all of it, and Pillow the least
            data = _check_png(data)
        header = _identify(io.BytesIO(data))
    except DECODING_ERRORS as error:
        raise broken(path, error) from error
    if lossless and not _is_lossless(data, header):
        raise ValueError(
            f"{path}: a label map must be lossless, but this is a {header.format} file, whose "
            "compression may have changed the ids. Use the original files of the dataset, or save "
            "the ids as PNG."
        )
    _check_number_of_pixels(path, header)
    # a decoder may fill missing pixels with gray, so a file without its end marker is first decoded
    # by Pillow, which is strict
    if not _has_end_marker(data, header.format):
        try:
            header.load()
        except DECODING_ERRORS as error:
            raise broken(path, error) from error
    return data, header


def identify(file: BinaryIO) -> Image.Image:
    """A Pillow image that has only read the header of an open file.

    Raises:
        UnidentifiedImageError, or another of `DECODING_ERRORS`: no format fits.
    """
    try:
        return _identify(file)
    except ValueError:  # a PNG with a large text or color profile, or a broken file
        file.seek(0)
        data = file.read()
        if not data.startswith(_PNG_SIGNATURE):
            raise
        return _identify(io.BytesIO(_check_png(data)))


def _identify(file: BinaryIO) -> Image.Image:
    """What Image.open returns, without its limit on pixels, which is a setting of the process.

    Raises:
        UnidentifiedImageError: no format of Pillow fits.
    """
    start = file.read(16)
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for name in Image.ID:
            factory, accepts = Image.OPEN[name]
            try:
                accepted = accepts is None or accepts(start)
                if not isinstance(accepted, str) and accepted:  # text: a package is missing
                    file.seek(0)
                    return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # another format, perhaps
                continue
    raise UnidentifiedImageError(f"no image format begins with {start[:8]!r}")


def _check_png(data: bytes) -> bytes:
    """A PNG without large texts and color profiles, which Pillow refuses.

    Raises:
        ValueError: a chunk up to the end of the PNG is truncated or does not match its CRC.
    """
    view, kept, copied = memoryview(data), [], 0
    for name, start, end in _chunks(data):
        stored = data[end : end + 4]
        if len(stored) < 4:
            raise ValueError(f"chunk {name!r} at byte {start} of the PNG is truncated")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(stored, "big"):
            raise ValueError(f"chunk {name!r} at byte {start} of the PNG does not match its CRC")
        if name in _PNG_METADATA and end - start - _PNG_CHUNK.size > _SMALL_METADATA:
            kept.append(view[copied:start])
            copied = end + 4
    return b"".join([*kept, view[copied:]]) if kept else data


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start, and end of the content, of each chunk of a PNG up to its last one."""
    start, name = len(_PNG_SIGNATURE), b""
    while name != b"IEND":
        if start + _PNG_CHUNK.size > len(data):
            raise ValueError(f"the PNG ends without its last chunk, after {len(data)} bytes")
        length, name = _PNG_CHUNK.unpack_from(data, start)
        end = start + _PNG_CHUNK.size + length
        yield name, start, end
        start = end + 4


def require_all_rows(data: bytes) -> None:
    """Check that a PNG has as many pixels as its header says; Pillow would make the others 0.

    Args:
        data: a file that `open_image_file` has returned.

    Raises:
        ValueError, zlib.error: it has fewer, or they cannot be inflated.
    """
    needed, found = _size_of_rows(data), 0
    inflate = zlib.decompressobj()
    for name, start, end in _chunks(data):
        rest = data[start + _PNG_CHUNK.size : end] if name == b"IDAT" else b""
        while rest and found < needed and not inflate.eof:
            found += len(inflate.decompress(rest, _INFLATED))
            rest = inflate.unconsumed_tail
    if found < needed and not inflate.eof:
        found += len(inflate.flush())
    if found < needed:
        raise ValueError(f"the PNG holds {found} of the {needed} bytes of its pixels")


def _size_of_rows(data: bytes) -> int:
    """Bytes of all rows of a PNG by its header, each with the byte of its filter."""
    _, width, height, depth, color, _, _, interlaced = PNG_HEADER.unpack_from(data)
    size = 0
    for left, top, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0:
            size += rows * (1 + -(-columns * depth * _PNG_SAMPLES[color] // 8))
    return size


def _is_lossless(data: bytes, header: Image.Image) -> bool:
    """Whether the pixels of a file are surely those that were saved."""
    if header.format == "WEBP":  # a single chunk, or a header and chunks that may be animations
        return data[12:16] == b"VP8L" or (data[12:16] == b"VP8X" and _has_chunk(data, b"VP8L"))
    if header.format == "TIFF":
        return header.info.get("compression") in _LOSSLESS_TIFF
    return header.format in _LOSSLESS_FORMATS


def _has_chunk(data: bytes, name: bytes) -> bool:
    """Whether a RIFF file has a chunk of this name at its top level."""
    start = 12
    while start + 8 <= len(data):
        if data[start : start + 4] == name:
            return True
        length = int.from_bytes(data[start + 4 : start + 8], "little")
        start += 8 + length + length % 2
    return False


def _check_number_of_pixels(path: Path, header: Image.Image) -> None:
    """Raise ValueError for an image that is larger than allowed or than a decoder can read."""
    text = os.environ.get(PIXELS_VARIABLE, "") or str(DEFAULT_MAX_PIXELS)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(
            f"the environment variable {PIXELS_VARIABLE} is {text!r}, but must be a whole number "
            "of pixels, at least 1"
        )
    width, height = header.size
    if width * height > int(text):
        raise ValueError(
            f"{path}: the image has {width}x{height} = {width * height} pixels; allowed are "
            f"{int(text)}. If it is not a broken file, set the environment variable "
            f"{PIXELS_VARIABLE}={width * height} to read it, which takes "
            f"{max(1, width * height * 3 >> 20)} MiB of memory."
        )
    if header.format in JPEG_FORMATS and max(width, height) > MAX_JPEG_SIDE:
        raise ValueError(
            f"{path}: the image has {width}x{height} pixels, but decoders of JPEG read at most "
            f"{MAX_JPEG_SIDE} per side. Store it as PNG, or cut it into parts."
        )


def _has_end_marker(data: bytes, format_: str | None) -> bool:
    if format_ == "PNG":
        return data.endswith(_PNG_END)
    if format_ in JPEG_FORMATS:
        return data[-1024:].rstrip(b"\0").endswith(_JPEG_END)
    return False


def bits_per_value(header: Image.Image, data: bytes) -> int:
    """Bits per value of a PNG or TIFF; 8 for other formats."""
    if header.format == "PNG":
        return int(PNG_HEADER.unpack_from(data)[3])
    if isinstance(header, TiffImagePlugin.TiffImageFile):
        return int(header.tag_v2.get(_TIFF_DEPTH, (8,))[0])
    return 8


def broken(path: Path, reason: object) -> ValueError:
    """The error about a file that cannot be decoded."""
    if isinstance(reason, Image.DecompressionBombError):
        return ValueError(
            f"{path}: Pillow reads at most {Image.MAX_IMAGE_PIXELS} x 2 pixels of a file of this "
            f"format ({reason}). Store it as PNG or JPEG, or raise PIL.Image.MAX_IMAGE_PIXELS."
        )
    return ValueError(
        f"{path}: cannot be read as an image: {reason}. Download or unpack the file again; "
        "`clouds check-data --full` lists every such file."
    )
