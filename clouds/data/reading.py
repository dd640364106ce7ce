"""One image or label file on disk -> one array.

Image files come as they come: grey, palette, with alpha, CMYK, 16 bits deep, turned by an EXIF
tag. Label files are stored in two ways, named by `Channel`.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
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

from clouds.data.label_space import IGNORE

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


@dataclass(frozen=True)
class LabelMapping:
    """Lookup from the ids in a dataset's label files ("raw" ids) to train ids.

    Attributes:
        name: what the ids are called in messages.
        raw_ids: train id -> the raw ids that become it, the most typical one first.
        void_ids: raw ids that are known and become `IGNORE`, the most typical one first.
    """

    name: str
    raw_ids: Mapping[int, tuple[int, ...]]
    void_ids: tuple[int, ...]

    @cached_property
    def _lut(self) -> UInt8Array:
        lut = np.full(256, IGNORE, np.uint8)
        for train_id, raws in self.raw_ids.items():
            lut[list(raws)] = train_id
        return lut

    @cached_property
    def _known(self) -> npt.NDArray[np.bool_]:
        known = np.zeros(256, np.bool_)
        for raws in (*self.raw_ids.values(), self.void_ids):
            known[list(raws)] = True
        return known

    @cached_property
    def _unknown(self) -> UInt8Array:
        return (~self._known).astype(np.uint8)

    @property
    def known_ids(self) -> tuple[int, ...]:
        """Every raw id that the dataset defines, ascending."""
        return tuple(int(i) for i in np.flatnonzero(self._known))

    @property
    def classes(self) -> tuple[int, ...]:
        """Train ids that some raw id becomes, ascending."""
        return tuple(sorted(self.raw_ids))

    def apply(self, raw: npt.NDArray[np.integer]) -> UInt8Array:
        """Turn raw ids into train ids.

        Args:
            raw: (H, W) of any integer type.

        Returns:
            (H, W) uint8; ids that are void or not known become `IGNORE`.
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
        # one look at each pixel; what they are is only sought where there are any
        if narrow is not None and not cv2.countNonZero(cv2.LUT(narrow, self._unknown)):
            return ()
        found = np.unique(raw)
        return tuple(int(i) for i in found if not (0 <= i < 256 and self._known[i]))

    def inverse(self) -> dict[int, int]:
        """One raw id for each train id that the dataset has, and one for `IGNORE`."""
        typical = {train_id: self.raw_ids[train_id][0] for train_id in self.classes}
        return typical | {IGNORE: self.void_ids[0]}


def _narrow(raw: npt.NDArray[np.integer]) -> UInt8Array | None:
    """Ids in one byte each, memory in order; None where one does not fit, or there are none."""
    if raw.dtype != np.uint8:
        if raw.size == 0 or raw.min() < 0 or raw.max() > 255:
            return None
        raw = raw.astype(np.uint8)
    return np.ascontiguousarray(raw, np.uint8)


@dataclass(frozen=True)
class LabelFile:
    """One kind of label file.

    Attributes:
        suffix: how the file's name ends.
        ids: lookup from its ids to train ids.
        channel: where in the file the ids lie.
    """

    suffix: str
    ids: LabelMapping
    channel: Channel = "index"
