"""One image or label file on disk -> one array.

Image files come as they come: grey, palette, with alpha, CMYK, 16 bits deep, turned by an EXIF
tag. Label files are stored in two ways, named by `Channel`.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    # PNG is lossless, so who decodes it makes no difference but to the time: this one takes a
    # third of OpenCV's and Pillow's
    from kornia_rs.io import decode_image_png_u8
except ImportError:
    decode_image_png_u8 = None

UInt8Array = npt.NDArray[np.uint8]
RawLabel = npt.NDArray[np.integer]

Channel = Literal["index", "red"]
"""Where a label file keeps its ids: 'index', in its only channel (the palette index, if it has a
palette, not the color); 'red', in the first of several channels, 8 or 16 bits deep (SYNTHIA)."""

# what Pillow lets through when a file is not what its header says
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_EXIF_ORIENTATION = 0x0112
_EXIF_SIZE = 1 << 17  # bytes; twice as much as EXIF's own limit
_PNG_HEADER = struct.Struct(">12x4sII5B")
"""Name, width, height, bit depth, color type, compression, filter, interlacing."""
_PNG_COLORS = {0: "mono", 2: "rgb", 3: "mono"}
"""Color types grey, RGB and palette, and what the fast decoder calls them."""
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"


def read_image(path: Path) -> UInt8Array:
    """Read an image file.

    Args:
        path: any format that Pillow knows; PNG and JPEG are fastest.

    Returns:
        (H, W, 3) uint8 RGB, upright (an EXIF orientation is applied). Alpha is dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated or no image; the message names it.
    """
    data, header = _open(path)
    if header.format == "PNG" and header.mode == "RGB" and not _has_exif(data, header):
        pixels = _decode_png(data)
        if pixels is not None:
            return pixels
    # OpenCV decodes faster; Pillow's conversion of CMYK is the one that people see elsewhere
    if header.format in ("PNG", "JPEG") and header.mode != "CMYK":
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if bgr is not None:
            return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
    try:
        upright = ImageOps.exif_transpose(header)
        return np.array(upright.convert("RGB"), np.uint8)
    except _DECODING_ERRORS as error:
        raise _broken(path, error) from error


def read_label(path: Path, channel: Channel = "index") -> RawLabel:
    """Read the ids in a label file, as they are stored.

    Args:
        path: a file of a lossless format, usually PNG.
        channel: where the ids lie. A file with a single channel is read alike for both.

    Returns:
        (H, W), uint8 or a wider integer type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, no image, lossy, or a color picture where a
            map of ids is expected; the message names it.
    """
    data, header = _open(path)
    if header.format == "JPEG":
        raise ValueError(
            f"{path}: a label map must be lossless, but this is a JPEG file, whose compression "
            "has changed the ids. Use the dataset's own PNG files."
        )
    stored = _decode_png(data) if header.format == "PNG" else None
    if stored is not None:
        return stored if stored.ndim == 2 else _only_channel(stored[..., ::-1], channel, path)
    if header.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
        try:
            ids = np.array(header)
        except _DECODING_ERRORS as error:
            raise _broken(path, error) from error
        return ids.astype(np.uint8) if ids.dtype == np.bool_ else ids
    # Pillow keeps 8 of the 16 bits of a color PNG, the wrong ones; OpenCV keeps all
    channels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if channels is None or not np.issubdtype(channels.dtype, np.integer):
        raise _broken(path, f"{header.format} file of mode {header.mode}")
    return _only_channel(np.asarray(channels), channel, path)


def _only_channel(channels: RawLabel, channel: Channel, path: Path) -> RawLabel:
    """(H, W[, C]) in OpenCV's order B, G, R[, A] -> the (H, W) that holds the ids."""
    if channels.ndim == 2:
        return channels
    red = np.ascontiguousarray(channels[..., min(2, channels.shape[2] - 1)])
    if channel == "index" and not all(
        np.array_equal(red, channels[..., i]) for i in range(min(3, channels.shape[2]))
    ):
        raise ValueError(
            f"{path}: expected one channel of label ids, found a color picture with "
            f"{channels.shape[2]} channels. It may be the colored version of the label, made for "
            "looking at; use the file with the ids."
        )
    return red


def _decode_png(data: bytes) -> UInt8Array | None:
    """What a PNG file of a common kind holds, as it is stored.

    Returns:
        (H, W) of a grey image, or of one with a palette: the indices; (H, W, 3) RGB of a color
        image. None when there is no fast decoder, the file is of another kind, or broken: the
        slower decoders then read it, or say what is wrong with it.
    """
    if decode_image_png_u8 is None or len(data) < _PNG_HEADER.size:
        return None
    name, width, height, depth, color, _, _, interlaced = _PNG_HEADER.unpack_from(data)
    if name != b"IHDR" or depth != 8 or color not in _PNG_COLORS or interlaced:
        return None
    try:
        pixels = decode_image_png_u8(data, (height, width), _PNG_COLORS[color])
    except Exception:  # it raises nothing narrower
        return None
    return np.asarray(pixels if _PNG_COLORS[color] == "rgb" else pixels[..., 0], np.uint8)


def _has_exif(data: bytes, header: Image.Image) -> bool:
    """Whether a PNG may be turned; the tag may also follow after the pixels."""
    return "exif" in header.info or b"eXIf" in data[-_EXIF_SIZE:]


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image or label file, upright, from its header alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the header is not that of an image; the message names the file.
    """
    try:
        with Image.open(path) as header:
            width, height = header.size
            if _turned(header):
                width, height = height, width
            return height, width
    except FileNotFoundError:
        raise
    except _DECODING_ERRORS as error:
        raise _broken(path, error) from error


def _turned(header: Image.Image) -> bool:
    """Whether EXIF says that rows and columns are exchanged."""
    # a PNG's getexif() would decode the picture, so only look when the header showed the tag
    if "exif" not in header.info:
        return False
    return int(header.getexif().get(_EXIF_ORIENTATION, 1)) >= 5


def _open(path: Path) -> tuple[bytes, Image.Image]:
    """The bytes of a complete image file, and its header as a Pillow image not decoded yet."""
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        raise ValueError(f"{path}: expected an image file, found a folder") from error
    if not data:
        raise _broken(path, "the file is empty (0 bytes)")
    try:
        header = Image.open(io.BytesIO(data))
        # a decoder may fill up what is missing with grey, so a file without its end marker is
        # first decoded by Pillow, which is strict
        if not _has_end_marker(data, header.format):
            header.load()
    except UnidentifiedImageError as error:
        raise _broken(path, f"it begins with {data[:8]!r}, like no image format") from error
    except _DECODING_ERRORS as error:
        raise _broken(path, error) from error
    return data, header


def _has_end_marker(data: bytes, format_: str | None) -> bool:
    if format_ == "PNG":
        return data.endswith(_PNG_END)
    if format_ == "JPEG":
        return data[-1024:].rstrip(b"\0").endswith(_JPEG_END)
    return False


def _broken(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path}: cannot be read as an image: {reason}. Fetch or unpack the file again; "
        "`python tools/check_datasets.py --full` lists every such file."
    )
