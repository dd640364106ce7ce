"""Decoding of one image file into one array; label files are read by `labels.py` in the same way.

Image files may be gray, with a palette or an alpha channel, CMYK, 16 bits deep, or rotated by an
EXIF tag.

What damage is seen depends on the format. Of a PNG, all checksums and the number of rows are
checked. A JPEG has no checksums: a decoder notices only what is no valid code. That is a truncated
file or scan, a missing restart marker, almost any hole of some hundred bytes, but only one in five
to one in two wrong bytes, and no scan that is left out at the end of a progressive file. Other
formats are as their decoder is.
Hashes in the manifest of generated images see every change.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

try:
    # PNG is lossless, so all decoders give the same pixels; this one takes a third of the time of
    # OpenCV's and Pillow's
    from kornia_rs.io import decode_image_png_u8
except ImportError:
    decode_image_png_u8 = None

from clouds.data.image_files import (
    DECODING_ERRORS,
    JPEG_FORMATS,
    PNG_HEADER,
    bits_per_value,
    broken,
    identify,
    open_image_file,
    require_all_rows,
)

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]
StoredPixels = npt.NDArray[np.integer]

_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")  # modes of Pillow
_OPENCV_SIDE = 1_000_000  # pixels
_EXIF_ORIENTATION = 0x0112
_EXIF_SIZE = 1 << 17  # bytes; twice the limit of EXIF
_PNG_COLORS = {0: "mono", 2: "rgb", 3: "mono"}  # color type -> its name in the fast decoder


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
    data, header = open_image_file(path, lossless=lossless)
    if header.format == "PNG" and header.mode == "RGB" and not _has_exif(data, header):
        pixels = _decode_png(data)
        if pixels is not None:
            return pixels
    if header.format in JPEG_FORMATS:
        pixels = _decode_jpeg(data, header, path, strict)
        if pixels is not None:
            return pixels
    if header.format == "PNG":  # OpenCV decodes faster than Pillow
        bgr = _decode_by_opencv(data, header, cv2.IMREAD_COLOR)
        if bgr is not None:
            return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
    try:
        if header.format == "PNG":
            require_all_rows(data)
        upright = ImageOps.exif_transpose(header)
        return np.array(upright.convert("RGB"), np.uint8)
    except DECODING_ERRORS as error:
        raise broken(path, error) from error


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
    data, header = open_image_file(path, lossless=True)
    decoded = _decode_png(data) if header.format == "PNG" else None
    if decoded is not None:
        return decoded, _palette(header)
    if header.mode in _ONE_CHANNEL:
        return _unscaled(_decode_by_pillow(path, header, data), header, data), _palette(header)
    # Pillow keeps only the high 8 of the 16 bits of a color PNG; OpenCV keeps all
    channels = _decode_by_opencv(data, header, cv2.IMREAD_UNCHANGED)
    if channels is not None and channels.ndim == 3 and channels.shape[2] > 2:
        channels = channels[..., [2, 1, 0, 3][: channels.shape[2]]]
    elif channels is None and header.mode in ("RGB", "RGBA") and bits_per_value(header, data) == 8:
        channels = _decode_by_pillow(path, header, data)
    if channels is None or not np.issubdtype(channels.dtype, np.integer):
        bits = bits_per_value(header, data)
        reason = f"{header.format} file of mode {header.mode}, {bits} bits per value"
        if header.format == "PNG":
            try:
                require_all_rows(data)
            except DECODING_ERRORS as error:
                raise broken(path, error) from error
            raise ValueError(
                f"{path}: OpenCV cannot decode this {reason}, {header.width}x{header.height} "
                "pixels. Store the ids in one channel."
            )
        raise broken(path, reason)
    return np.asarray(channels), None


def _unscaled(
    pixels: npt.NDArray[np.generic], header: Image.Image, data: bytes
) -> npt.NDArray[np.integer]:
    """Gray values or indices of one channel from those of Pillow, which scales 2 and 4 bits."""
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8)
    values = np.asarray(pixels).astype(pixels.dtype.newbyteorder("="), copy=False)
    depth = bits_per_value(header, data)
    return values // np.uint8(255 // (2**depth - 1)) if header.mode == "L" and depth < 8 else values


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
    if decode_image_png_u8 is None or len(data) < PNG_HEADER.size:
        return None
    name, width, height, depth, color, _, _, interlaced = PNG_HEADER.unpack_from(data)
    if name != b"IHDR" or depth != 8 or color not in _PNG_COLORS or interlaced:
        return None
    try:
        pixels = decode_image_png_u8(data, (height, width), _PNG_COLORS[color])
    except Exception:  # kornia_rs raises no narrower type
        return None
    return np.asarray(pixels if _PNG_COLORS[color] == "rgb" else pixels[..., 0], np.uint8)


def _decode_by_opencv(
    data: bytes, header: Image.Image, flags: int
) -> npt.NDArray[np.generic] | None:
    """What cv2.imdecode returns; None, too, for an image that exceeds limits of it or of libpng."""
    if max(header.size) > _OPENCV_SIDE:  # libpng would complain on the console
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _decode_by_pillow(path: Path, header: Image.Image, data: bytes) -> npt.NDArray[np.generic]:
    try:
        pixels = np.array(header)
        # Rows that are missing are 0 here. To count those of the file takes half as long as to
        # decode it, so only where the last row, which is stored last, may be missing.
        if header.format == "PNG" and (header.info.get("interlace") or not pixels[-1].any()):
            require_all_rows(data)
        return pixels
    except DECODING_ERRORS as error:
        raise broken(path, error) from error


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


def _has_exif(data: bytes, header: Image.Image) -> bool:
    """Whether a PNG may have an EXIF orientation; the tag may also follow after the pixels."""
    return "exif" in header.info or b"eXIf" in data[-_EXIF_SIZE:]


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an upright image or label, from its header; raises as `read_image`."""
    try:
        with path.open("rb") as file:
            header = identify(file)
            width, height = header.size
            if _is_transposed(header):
                width, height = height, width
            return height, width
    except FileNotFoundError:
        raise
    except DECODING_ERRORS as error:
        raise broken(path, error) from error


def _is_transposed(header: Image.Image) -> bool:
    """Whether the EXIF orientation exchanges rows and columns."""
    # getexif() decodes a PNG, so it is called only when the header has shown the tag
    if "exif" not in header.info:
        return False
    return header.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
