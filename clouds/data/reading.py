"""Decoding of one image or label file into one array.

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
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    # PNG is lossless, so all decoders give the same pixels; this one takes a third of the time of
    # OpenCV's and Pillow's
    from kornia_rs.io import decode_image_png_u8
except ImportError:
    decode_image_png_u8 = None

from clouds.data.label_space import IGNORE
from clouds.messages import format_examples

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]
RawLabel = npt.NDArray[np.integer]

Channel = Literal["index", "red"]
"""Where a label file stores its ids: 'index': in its only channel (the palette index, if it has a
palette, not the color); 'red': in the first of several channels, 8 or 16 bits deep (SYNTHIA)."""

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
_EXIF_ORIENTATION = 0x0112
_EXIF_SIZE = 1 << 17  # bytes; twice the limit of EXIF
_PNG_HEADER = struct.Struct(">12x4sII5B")  # name, width, height, depth, color, …, interlacing
_PNG_COLORS = {0: "mono", 2: "rgb", 3: "mono"}  # color type -> its name in the fast decoder
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = struct.Struct(">I4s")  # length of the content, name
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"


class DamagedImageError(ValueError):
    """A JPEG that can be decoded, although its data is corrupt, with wrong pixels."""


def read_image(path: Path, strict: bool = False) -> UInt8Array:
    """Read an image of any format that Pillow reads; PNG and JPEG are fastest.

    Args:
        path: its file.
        strict: corrupt data that a decoder of JPEG only warns of is an error. Otherwise it is a
            warning, once per file and process, and the pixels are what the decoder makes of it.

    Returns:
        (H, W, 3) uint8 RGB, upright (an EXIF orientation is applied). Alpha is dropped.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedImageError: a ValueError; see `strict`.
        ValueError: the file is empty, truncated, fails its checksums or is not an image; the
            message names it.
    """
    data, header = _open(path)
    if header.format == "PNG" and header.mode == "RGB" and not _has_exif(data, header):
        pixels = _decode_png(data)
        if pixels is not None:
            return pixels
    if header.format == "JPEG":
        pixels = _decode_jpeg(data, header, path, strict)
        if pixels is not None:
            return pixels
    if header.format == "PNG":  # OpenCV decodes faster than Pillow
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if bgr is not None:
            return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
    try:
        upright = ImageOps.exif_transpose(header)
        return np.array(upright.convert("RGB"), np.uint8)
    except _DECODING_ERRORS as error:
        raise _broken(path, error) from error


def read_label(path: Path, channel: Channel = "index") -> RawLabel:
    """Read the raw ids of a label file.

    Args:
        path: file of a lossless format, usually PNG.
        channel: where the ids of a file with several channels are stored.

    Returns:
        (H, W), uint8 or a wider integer type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, not an image, lossy, or a color image instead
            of a map of ids; the message names it.
    """
    data, header = _open(path)
    if header.format == "JPEG":
        raise ValueError(
            f"{path}: a label map must be lossless, but this is a JPEG file, whose compression "
            "has changed the ids. Use the original PNG files of the dataset."
        )
    stored = _decode_png(data) if header.format == "PNG" else None
    if stored is not None:
        return stored if stored.ndim == 2 else _id_channel(stored[..., ::-1], channel, path)
    if header.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
        try:
            ids = np.array(header)
        except _DECODING_ERRORS as error:
            raise _broken(path, error) from error
        return ids.astype(np.uint8) if ids.dtype == np.bool_ else ids
    # Pillow keeps only the high 8 of the 16 bits of a color PNG; OpenCV keeps all
    channels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if channels is None or not np.issubdtype(channels.dtype, np.integer):
        raise _broken(path, f"{header.format} file of mode {header.mode}")
    return _id_channel(np.asarray(channels), channel, path)


def _id_channel(channels: RawLabel, channel: Channel, path: Path) -> RawLabel:
    """The channel (H, W) with the ids of (H, W[, C]) in OpenCV's order B, G, R[, A]."""
    if channels.ndim == 2:
        return channels
    red = np.ascontiguousarray(channels[..., min(2, channels.shape[2] - 1)])
    if channel == "index" and not all(
        np.array_equal(red, channels[..., i]) for i in range(min(3, channels.shape[2]))
    ):
        raise ValueError(
            f"{path}: expected one channel of label ids, but this is a color image with "
            f"{channels.shape[2]} channels. It may be the colored version of the label, made for "
            "display; use the file with the ids."
        )
    return red


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


def _check_png(data: bytes) -> None:
    """Raise ValueError unless all chunks of a PNG, up to its end, match their CRCs."""
    view, start = memoryview(data), len(_PNG_SIGNATURE)
    name = b""
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
        start = end + 4


def _has_exif(data: bytes, header: Image.Image) -> bool:
    """Whether a PNG may have an EXIF orientation; the tag may also follow after the pixels."""
    return "exif" in header.info or b"eXIf" in data[-_EXIF_SIZE:]


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an upright image or label, from its header; raises as `read_image`."""
    try:
        with Image.open(path) as header:
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


def _open(path: Path) -> tuple[bytes, Image.Image]:
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
            _check_png(data)
        header = Image.open(io.BytesIO(data))
        # a decoder may fill missing pixels with gray, so a file without its end marker is first
        # decoded by Pillow, which is strict
        if not _has_end_marker(data, header.format):
            header.load()
    except UnidentifiedImageError as error:
        raise _broken(path, f"no image format begins with {data[:8]!r}") from error
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
        f"{path}: cannot be read as an image: {reason}. Download or unpack the file again; "
        "`clouds check-data --full` lists every such file."
    )


@dataclass(frozen=True)
class LabelMapping:
    """Lookup from the ids in the label files of a dataset ("raw" ids) to train ids.

    Attributes:
        name: name of the ids in messages.
        raw_ids: train id -> the raw ids that are mapped to it, the most typical one first.
        ignore_ids: raw ids that are mapped to `IGNORE`, the most typical one first.
    """

    name: str
    raw_ids: Mapping[int, tuple[int, ...]]
    ignore_ids: tuple[int, ...]

    @cached_property
    def _lut(self) -> UInt8Array:
        lut = np.full(256, IGNORE, np.uint8)
        for train_id, raws in self.raw_ids.items():
            lut[list(raws)] = train_id
        return lut

    @cached_property
    def _unknown(self) -> UInt8Array:
        unknown = np.ones(256, np.uint8)
        for raws in (*self.raw_ids.values(), self.ignore_ids):
            unknown[list(raws)] = 0
        return unknown

    @property
    def classes(self) -> tuple[int, ...]:
        """Train ids of which the dataset has a raw id, ascending."""
        return tuple(sorted(self.raw_ids))

    def apply(self, raw: npt.NDArray[np.integer]) -> UInt8Array:
        """Train ids, uint8 (H, W), of raw ids (H, W) of any integer type.

        `IGNORE` where a raw id is one of `ignore_ids` or undefined.
        """
        if (narrow := _narrow(raw)) is not None:
            return np.asarray(cv2.LUT(narrow, self._lut), np.uint8)
        inside = (raw >= 0) & (raw < 256)
        train_ids = self._lut[np.where(inside, raw, 0)]
        train_ids[~inside] = IGNORE
        return train_ids

    def unknown_ids(self, raw: npt.NDArray[np.integer]) -> tuple[int, ...]:
        """The ids in `raw` (H, W) that the dataset does not define, ascending."""
        if raw.size == 0:
            return ()
        narrow = _narrow(raw)
        # a lookup is much faster than sorting, which is only needed when there are unknown ids
        if narrow is not None and not cv2.countNonZero(cv2.LUT(narrow, self._unknown)):
            return ()
        present = np.unique(raw)
        return tuple(int(i) for i in present if not 0 <= i < 256 or self._unknown[i])

    def inverse(self) -> dict[int, int]:
        """One raw id for each train id that the dataset has, and one for `IGNORE`."""
        typical = {train_id: self.raw_ids[train_id][0] for train_id in self.classes}
        return typical | {IGNORE: self.ignore_ids[0]}


def _narrow(raw: npt.NDArray[np.integer]) -> UInt8Array | None:
    """Ids as contiguous uint8; None where an id does not fit, or there are none."""
    if raw.dtype != np.uint8:
        if raw.size == 0 or raw.min() < 0 or raw.max() > 255:
            return None
        raw = raw.astype(np.uint8)
    return np.ascontiguousarray(raw, np.uint8)


@dataclass(frozen=True)
class LabelFormat:
    """How the ids in the label files of a dataset are stored and mapped.

    Attributes:
        suffix: end of the names of these files.
        ids: mapping of the ids.
        channel: where they are stored.
        advice: end of the message about other ids.
    """

    suffix: str
    ids: LabelMapping
    channel: Channel = "index"
    advice: str = "A label that was converted to train ids must be named *_labelTrainIds.png."


def read_train_ids(path: Path, label_format: LabelFormat, dataset: str) -> UInt8Array:
    """Read a label file: train ids, uint8 (H, W), `IGNORE` where a pixel does not count.

    Raises:
        ValueError: the file has ids that `dataset` does not define; or as `read_label`.
    """
    raw = read_label(path, label_format.channel)
    unknown = label_format.ids.unknown_ids(raw)
    if unknown:
        raise ValueError(
            f"{path}: contains the ids {format_examples(unknown, 10)}, which are not among the "
            f"{label_format.ids.name}. Is it a label of {dataset}? {label_format.advice}"
        )
    return label_format.ids.apply(raw)
