"""Reading and writing of videos, a frame at a time."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from clouds.files import check_regular

UInt8Array = npt.NDArray[np.uint8]

DEFAULT_RATE = 25.0
"""Frames per second of a camera or file that does not tell its own."""

CODEC = "mp4v"
"""MPEG-4 part 2: OpenCV's packages contain its encoder, and none for H.264."""

_NOT_UTF8 = "its path is not UTF-8, and OpenCV cannot use it. Rename the file or folder."


def _is_utf8(path: Path) -> bool:
    """Whether OpenCV can use a path; others end the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


class VideoReader:
    """A video file or a camera.

    Args:
        source: a file, or the number of a camera.
        max_frames: frames after which reading ends; None: all.

    Attributes:
        rate: frames per second.
        num_frames: number of frames that will be read, as the file tells it; None: not known.

    Raises:
        ValueError: it cannot be opened, or is a FIFO or a device.
    """

    def __init__(self, source: Path | int, max_frames: int | None = None) -> None:
        self.source, self.max_frames = source, max_frames
        if isinstance(source, Path):
            check_regular(source)
            if not _is_utf8(source):
                raise ValueError(f"video '{source}' cannot be opened: {_NOT_UTF8}")
        self._capture: Any = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            what = f"camera {source}" if isinstance(source, int) else f"video '{source}'"
            raise ValueError(
                f"{what} cannot be opened: it does not exist or OpenCV cannot decode it."
            )
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.rate = rate if 0 < rate < 1000 else DEFAULT_RATE
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        known = [n for n in (count, max_frames) if n is not None and n > 0]
        self.num_frames = min(known) if known else None

    def __iter__(self) -> Iterator[UInt8Array]:
        """Frames, (H, W, 3) uint8 RGB; the file is closed at the end."""
        number = 0
        try:
            while self.max_frames is None or number < self.max_frames:
                read, frame = self._capture.read()
                if not read:
                    break
                number += 1
                yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
        finally:
            self._capture.release()


class VideoWriter:
    """Writes an .mp4 file, which appears under its name when it is complete.

    A context manager. The first frame decides the size; odd sizes are padded with white by a pixel,
    as the encoder needs even ones.

    Args:
        path: the file; it is replaced if it exists, and its folder is created.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.part{path.suffix}")
        self._writer: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frame: UInt8Array) -> None:
        """Append a frame, (H, W, 3) uint8 RGB, of the same size as the first.

        Raises:
            OSError: the file cannot be written.
        """
        height, width = frame.shape[:2]
        padding = ((0, height % 2), (0, width % 2), (0, 0))
        even = np.pad(frame, padding, constant_values=255)
        if self._writer is None:
            self._writer = self._open(even.shape[1], even.shape[0])
        self._writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))

    def _open(self, width: int, height: int) -> Any:
        if not _is_utf8(self._partial):
            raise OSError(f"video '{self.path}' cannot be written: {_NOT_UTF8}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        codec = cv2.VideoWriter.fourcc(*CODEC)
        writer = cv2.VideoWriter(str(self._partial), codec, self.rate, (width, height))
        if not writer.isOpened():
            raise OSError(
                f"video '{self.path}' of {width}x{height} pixels cannot be written by OpenCV: the "
                f"folder is not writable, or the encoder {CODEC} is missing."
            )
        return writer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)
