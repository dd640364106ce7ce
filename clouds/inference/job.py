"""Predicting files and writing the results, with bounded memory."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from clouds.inference.images import to_rgb
from clouds.inference.inputs import Input
from clouds.inference.segmentation import Segmentation
from clouds.inference.segmenter import Segmenter
from clouds.inference.video import VideoReader, VideoWriter

logger = logging.getLogger(__name__)

LOG_INTERVAL = 30.0
"""Seconds between two updates of a progress bar that is not on a terminal."""


@dataclass
class Totals:
    """What was predicted.

    Attributes:
        images: number of images and frames.
        seconds: time for reading, predicting and writing.
        unreadable: inputs that could not be read.
    """

    images: int = 0
    seconds: float = 0.0
    unreadable: list[Path | int] = field(default_factory=list)


def predict_files(
    segmenter: Segmenter,
    inputs: Sequence[Input],
    folder: Path,
    kinds: Sequence[str],
    *,
    batch_size: int = 1,
    max_frames: int | None = None,
) -> Totals:
    """Predict inputs and write images of the predictions: `<name>_<kind>.png`, or .mp4.

    An input that cannot be read is logged, counted and skipped.

    Args:
        kinds: of `clouds.inference.segmentation.KINDS`.
        batch_size: images or frames of the same size that are predicted together.
        max_frames: frames of each video or camera; None: all.

    Raises:
        OSError: a file cannot be written.
    """
    totals = Totals()
    start = perf_counter()
    images = [item for item in inputs if not item.is_video]
    if images:
        _predict_images(segmenter, images, folder, kinds, batch_size, totals)
    for item in inputs:
        if item.is_video:
            _predict_video(segmenter, item, folder, kinds, batch_size, max_frames, totals)
    totals.seconds = perf_counter() - start
    return totals


def _predict_images(
    segmenter: Segmenter,
    inputs: Sequence[Input],
    folder: Path,
    kinds: Sequence[str],
    batch_size: int,
    totals: Totals,
) -> None:
    read: deque[Input] = deque()

    def readable() -> Iterator[npt.NDArray[np.uint8]]:
        for item in inputs:
            assert isinstance(item.source, Path)
            try:
                pixels = to_rgb(item.source)
            except (OSError, ValueError) as error:
                _skip(item, error, totals)
                progress.update()
                continue
            read.append(item)
            yield pixels

    with _progress(len(inputs), "images", "image") as progress:
        for result in segmenter.stream(readable(), batch_size=batch_size):
            for kind, path in read.popleft().outputs(folder, kinds).items():
                result.save(path, kind)
            totals.images += 1
            progress.update()


def _predict_video(
    segmenter: Segmenter,
    item: Input,
    folder: Path,
    kinds: Sequence[str],
    batch_size: int,
    max_frames: int | None,
    totals: Totals,
) -> None:
    try:
        reader = VideoReader(item.source, max_frames)
    except ValueError as error:
        _skip(item, error, totals)
        return
    outputs = item.outputs(folder, kinds)
    count = 0
    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(VideoWriter(path, reader.rate))
            for kind, path in outputs.items()
        }
        progress = stack.enter_context(_progress(reader.num_frames, item.name, "frame"))
        for result in segmenter.stream(reader, batch_size=batch_size):
            for kind, writer in writers.items():
                writer.write(_frame(result, kind))
            count += 1
            progress.update()
    totals.images += count
    if count == 0:
        _skip(item, ValueError(f"'{item.source}': no frame of the video can be read."), totals)
    elif reader.num_frames is not None and count < reader.num_frames:
        logger.warning("'%s': %d of %d frames could be read", item.source, count, reader.num_frames)


def _frame(result: Segmentation, kind: str) -> npt.NDArray[np.uint8]:
    """An image whose size does not depend on the prediction: the legend has all classes."""
    if kind == "overlay":
        output = result.overlay(legend=range(result.label_space.num_classes))
        return np.asarray(output, np.uint8)
    return np.asarray(result.to_image(kind), np.uint8)


def _skip(item: Input, error: Exception, totals: Totals) -> None:
    logger.warning("skipped: %s", error)
    totals.unreadable.append(item.source)


def _progress(total: int | None, what: str, unit: str) -> Any:
    interval = 0.1 if sys.stderr.isatty() else LOG_INTERVAL
    empty: Iterable[None] | None = None
    return tqdm(empty, desc=what, total=total, unit=unit, mininterval=interval, dynamic_ncols=True)
