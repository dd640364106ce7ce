"""Decoding of one image file into one array; label files are read by `labels.py` in the same way.

Image files may be gray, with a palette or an alpha channel, CMYK, 16 bits deep, or rotated by an
EXIF tag.

What damage is seen depends on the format. A PNG has a CRC-32 per chunk: all are checked before any
decoder sees the file. A JPEG has no checksum: a decoder notices only what is no valid code, most
holes of some hundred bytes, but about half of the single wrong bytes pass as other pixels. Other
formats are as their decoder is. Hashes in the manifest of generated images see every change.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

try:
    # PNG is lossless, so all decoders give the same pixels; this one takes a third of the time of
    # OpenCV's and Pillow's
    from kornia_rs.io import decode_image_png_u8
except ImportError:
    decode_image_png_u8 = None

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]
StoredPixels = npt.NDArray[np.integer]

PIXELS_VARIABLE = "CLOUDS_MAX_IMAGE_PIXELS"
"""Environment variable: the largest number of pixels that an image file may have."""

DEFAULT_MAX_PIXELS = 1 << 29
"""32768 x 16384; 1.6 GB as RGB. More is refused, so that a damaged or malicious header does not
fill the memory."""

_JPEG_FORMATS = ("JPEG", "MPO")
"""Pillow's names; the second one is a JPEG with further images, such as a preview."""

MAX_JPEG_SIDE = 65500
"""Pixels; a limit of libjpeg, in every decoder."""

# what Pillow raises when the content of a file does not agree with its header
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")  # modes of Pillow
_LOSSLESS_FORMATS = ("PNG", "BMP", "DIB", "GIF", "PPM", "TGA", "PCX", "SGI")
_LOSSLESS_TIFF = (
    *("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd"),
    *("tiff_ccitt", "group3", "group4"),
)
_TIFF_DEPTH = 258
_EXIF_ORIENTATION = 0x0112
_EXIF_SIZE = 1 << 17  # bytes; twice the limit of EXIF
_PNG_HEADER = struct.Struct(">12x4sII5B")  # name, width, height, depth, color, …, interlacing
_PNG_COLORS = {0: "mono", 2: "rgb", 3: "mono"}  # color type -> its name in the fast decoder
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = struct.Struct(">I4s")  # length of the content, name
_PNG_END = b"IEND\xaeB`\x82"
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_SMALL_METADATA = 1000  # bytes; zlib expands them to less than Pillow's limit of 1 MiB
_JPEG_END = b"\xff\xd9"


class DamagedImageError(ValueError):
    """A JPEG that can be decoded, although its data is corrupt, with wrong pixels."""


def read_image(path: Path, strict: bool = False, lossless: bool = False) -> UInt8Array:
    """Read an image of any format that Pillow reads; PNG and JPEG are fastest.

    Args:
        path: its file.
        strict: corrupt data that a decoder of JPEG only warns of is an error. Otherwise it is a
            warning, once per file and process, and the pixels are what the decoder makes of it.
        lossless: refuse formats whose compression may have changed pixels.

    Returns:
        (H, W, 3) uint8 RGB, upright (an EXIF orientation is applied). Alpha is dropped.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedImageError: a ValueError; see `strict`.
        ValueError: the file is empty, truncated, too large, fails its checksums or is not an
            image; the message names it.
    """
    data, header = _open(path, lossless=lossless)
    if header.format == "PNG" and header.mode == "RGB" and not _has_exif(data, header):
        pixels = _decode_png(data)
        if pixels is not None:
            return pixels
    if header.format in _JPEG_FORMATS:
        pixels = _decode_jpeg(data, header, path, strict)
        if pixels is not None:
            return pixels
    if header.format == "PNG":  # OpenCV decodes faster than Pillow
        bgr = _decode_by_opencv(data, cv2.IMREAD_COLOR)
        if bgr is not None:
            return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
    try:
        upright = ImageOps.exif_transpose(header)
        return np.array(upright.convert("RGB"), np.uint8)
    except _DECODING_ERRORS as error:
        raise _broken(path, error) from error


def read_stored(path: Path) -> tuple[StoredPixels, UInt8Array | None]:
    """Read the values of a file as they are stored: not scaled, and indices instead of colors.

    Args:
        path: file of a lossless format, usually PNG.

    Returns:
        - (H, W), gray values or palette indices, or (H, W, C) in the order R, G, B[, A], of the
          smallest type that the format allows: uint8 for 1 to 8 bits per value;
        - RGB colors (N, 3) of the palette, None without one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, too large, not an image, perhaps lossy, or its
            values are no integers; the message names it.
    """
    data, header = _open(path, lossless=True)
    decoded = _decode_png(data) if header.format == "PNG" else None
    if decoded is not None:
        return decoded, _palette(header)
    if header.mode in _ONE_CHANNEL:
        try:
            return _unscaled(np.array(header), header, data), _palette(header)
        except _DECODING_ERRORS as error:
            raise _broken(path, error) from error
    # Pillow keeps only the high 8 of the 16 bits of a color PNG; OpenCV keeps all
    channels = _decode_by_opencv(data, cv2.IMREAD_UNCHANGED)
    if channels is not None and channels.ndim == 3 and channels.shape[2] > 2:
        channels = channels[..., [2, 1, 0, 3][: channels.shape[2]]]
    elif channels is None and header.mode in ("RGB", "RGBA") and _depth(header, data) == 8:
        channels = np.array(header)
    if channels is None or not np.issubdtype(channels.dtype, np.integer):
        bits = _depth(header, data)
        raise _broken(path, f"{header.format} file of mode {header.mode}, {bits} bits per value")
    return np.asarray(channels), None


def _unscaled(
    pixels: npt.NDArray[np.generic], header: Image.Image, data: bytes
) -> npt.NDArray[np.integer]:
    """Gray values or indices of one channel from those of Pillow, which scales 2 and 4 bits."""
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8)
    values = np.asarray(pixels).astype(pixels.dtype.newbyteorder("="), copy=False)
    depth = _depth(header, data)
    return values // np.uint8(255 // (2**depth - 1)) if header.mode == "L" and depth < 8 else values


def _depth(header: Image.Image, data: bytes) -> int:
    """Bits per value of a PNG or TIFF; 8 for other formats."""
    if header.format == "PNG":
        return int(_PNG_HEADER.unpack_from(data)[3])
    if isinstance(header, TiffImagePlugin.TiffImageFile):
        return int(header.tag_v2.get(_TIFF_DEPTH, (8,))[0])
    return 8


def _palette(header: Image.Image) -> UInt8Array | None:
    """RGB colors (N, 3) of the palette of a file, without alpha."""
    if header.mode != "P" or header.palette is None:
        return None
    channels = len(header.palette.mode)  # RGB or RGBA
    colors = np.frombuffer(bytes(header.palette.palette), np.uint8)
    return colors[: colors.size // channels * channels].reshape(-1, channels)[:, :3]


def is_one_color(pixels: UInt8Array) -> bool:
    """Whether all pixels of an image (H, W, 3) are the same.

    An image that is not ends at the first of its rows that has two colors, mostly the first one.
    """
    color = pixels[0, 0]
    return all(bool((row == color).all()) for row in pixels)


def _decode_png(data: bytes) -> UInt8Array | None:
    """(H, W) gray values or palette indices, or (H, W, 3) RGB, of a PNG of 8 bits without alpha.

    None without the fast decoder, and for other and broken files, left to the slower decoders. The
    fast one does not look at the checksum of the pixels (zlib's), only those of the chunks count.
    """
    if decode_image_png_u8 is None or len(data) < _PNG_HEADER.size:
        return None
    name, width, height, depth, color, _, _, interlaced = _PNG_HEADER.unpack_from(data)
    if name != b"IHDR" or depth != 8 or color not in _PNG_COLORS or interlaced:
        return None
    try:
        pixels = decode_image_png_u8(data, (height, width), _PNG_COLORS[color])
    except Exception:  # kornia_rs raises no narrower type
        return None
    return np.asarray(pixels if _PNG_COLORS[color] == "rgb" else pixels[..., 0], np.uint8)


def _decode_by_opencv(data: bytes, flags: int) -> npt.NDArray[np.generic] | None:
    """What cv2.imdecode returns; None also for an image that exceeds OpenCV's limits of size."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _decode_jpeg(data: bytes, header: Image.Image, path: Path, strict: bool) -> UInt8Array | None:
    """(H, W, 3) RGB of a JPEG, after a check of its data; for `strict` see `read_image`.

    None: left to Pillow, because it is CMYK, rotated by its EXIF tag or cannot be decoded here.
    """
    colors = "CMYK" if header.mode == "CMYK" else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(data, colors, strict=True)
    except ValueError as warning:
        try:
            pixels = simplejpeg.decode_jpeg(data, colors, strict=False)
        except ValueError:
            return None
        if strict:
            raise DamagedImageError(_damage(path, warning)) from warning
        _warn_once(_damage(path, warning))
    rotated = "exif" in header.info and header.getexif().get(_EXIF_ORIENTATION, 1) != 1
    return None if rotated or colors == "CMYK" else np.asarray(pixels, np.uint8)


def _damage(path: Path, reason: ValueError) -> str:
    return (
        f"{path}: its JPEG data is damaged ({reason}), so some of its pixels are wrong. Download "
        "or unpack the file again; `clouds check-data --full` lists every such file."
    )


@cache
def _warn_once(message: str) -> None:
    """Log a warning, the first time that a process has it."""
    logger.warning("%s", message)


def _check_png(data: bytes) -> bytes:
    """A PNG without large texts and color profiles, which Pillow refuses.

    Raises:
        ValueError: a chunk up to the end of the PNG is truncated or does not match its CRC.
    """
    view, start = memoryview(data), len(_PNG_SIGNATURE)
    name = b""
    kept, copied = [], 0
    while name != b"IEND":
        if start + _PNG_CHUNK.size > len(data):
            raise ValueError(f"the PNG ends without its last chunk, after {len(data)} bytes")
        length, name = _PNG_CHUNK.unpack_from(data, start)
        end = start + _PNG_CHUNK.size + length
        stored = data[end : end + 4]
        if len(stored) < 4:
            raise ValueError(f"chunk {name!r} at byte {start} of the PNG is truncated")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(stored, "big"):
            raise ValueError(f"chunk {name!r} at byte {start} of the PNG does not match its CRC")
        if name in _PNG_METADATA and length > _SMALL_METADATA:
            kept.append(view[copied:start])
            copied = end + 4
        start = end + 4
    return b"".join([*kept, view[copied:]]) if kept else data


def _has_exif(data: bytes, header: Image.Image) -> bool:
    """Whether a PNG may have an EXIF orientation; the tag may also follow after the pixels."""
    return "exif" in header.info or b"eXIf" in data[-_EXIF_SIZE:]


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an upright image or label, from its header; raises as `read_image`."""
    try:
        with path.open("rb") as file:
            header = _identify(file)
            width, height = header.size
            if _is_transposed(header):
                width, height = height, width
            return height, width
    except FileNotFoundError:
        raise
    except _DECODING_ERRORS as error:
        raise _broken(path, error) from error


def _is_transposed(header: Image.Image) -> bool:
    """Whether the EXIF orientation exchanges rows and columns."""
    # getexif() decodes a PNG, so it is called only when the header has shown the tag
    if "exif" not in header.info:
        return False
    return header.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)


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
            accepted = accepts is None or accepts(start)
            if isinstance(accepted, str) or not accepted:  # text: a package is missing for it
                continue
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # another format, perhaps
                continue
    raise UnidentifiedImageError(f"no image format begins with {start[:8]!r}")


def _open(path: Path, lossless: bool = False) -> tuple[bytes, Image.Image]:
    """The bytes of a complete image file, and a Pillow image that has only read the header."""
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        raise ValueError(f"{path}: expected an image file, but this is a folder") from error
    except ValueError as error:  # the character 0, or half a surrogate pair
        raise ValueError(f"image {str(path)!r}: no file can have this name: {error}") from error
    if not data:
        raise _broken(path, "the file is empty (0 bytes)")
    try:
        if data.startswith(_PNG_SIGNATURE):  # no decoder checks all of it, and Pillow the least
            data = _check_png(data)
        header = _identify(io.BytesIO(data))
    except _DECODING_ERRORS as error:
        raise _broken(path, error) from error
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
        except _DECODING_ERRORS as error:
            raise _broken(path, error) from error
    return data, header


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
    if header.format in _JPEG_FORMATS and max(width, height) > MAX_JPEG_SIDE:
        raise ValueError(
            f"{path}: the image has {width}x{height} pixels, but decoders of JPEG read at most "
            f"{MAX_JPEG_SIDE} per side. Store it as PNG, or cut it into parts."
        )


def _has_end_marker(data: bytes, format_: str | None) -> bool:
    if format_ == "PNG":
        return data.endswith(_PNG_END)
    if format_ in _JPEG_FORMATS:
        return data[-1024:].rstrip(b"\0").endswith(_JPEG_END)
    return False


def _broken(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path}: cannot be read as an image: {reason}. Download or unpack the file again; "
        "`clouds check-data --full` lists every such file."
    )
