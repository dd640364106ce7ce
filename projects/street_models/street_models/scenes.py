"""Rendered scenes for pre-training, kept as arrays in a folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from street_renderer.pretraining_style import (
    PRETRAINING_STYLE,
    PretrainingScene,
    Split,
    pretraining_scene,
)
from street_renderer.renderer import RENDERER_VERSION
from tqdm import tqdm

from clouds.files import atomic_write

UInt8Array = npt.NDArray[np.uint8]
_RECORD, _DONE, _FACTS = "scenes.json", "done.txt", "facts.jsonl"
_SAVE_EVERY = 200


@dataclass(frozen=True)
class Facts:
    """What captions may say of a whole scene; see `PretrainingScene`."""

    weather: str
    time: str
    place: str
    eye: float
    autumn: float

    @staticmethod
    def of(scene: PretrainingScene) -> Facts:
        """Those of a rendered scene."""
        return Facts(
            scene.weather, scene.time, scene.place, round(scene.eye, 3), round(scene.autumn, 3)
        )


@dataclass(frozen=True)
class SceneSet:
    """Which scenes a folder holds.

    Attributes:
        seed, split: of `pretraining_scene`.
        count: number of scenes.
        height, width: of an image, pixels.
        style, renderer: versions of what rendered them.
    """

    seed: int
    split: Split
    count: int
    height: int
    width: int
    style: int = PRETRAINING_STYLE
    renderer: int = RENDERER_VERSION


class Scenes:
    """The scenes of a folder that `render_scenes` has written.

    Attributes:
        images: (N, H, W, 3) uint8 RGB.
        labels: (N, H, W) uint8 train ids, 255 for unlabeled.
        instances: (N, H, W) uint8, number of the object, 0 for stuff.
        facts: one per scene.

    Raises:
        FileNotFoundError: the folder holds no scenes, or rendering was interrupted.
    """

    def __init__(self, folder: Path) -> None:
        record = folder / _RECORD
        if not record.is_file():
            raise FileNotFoundError(f"{folder} holds no rendered scenes ({_RECORD} is missing)")
        self.set = SceneSet(**json.loads(record.read_text()))
        if (done := _done(folder)) < self.set.count:
            raise FileNotFoundError(
                f"{folder} holds {done} of {self.set.count} scenes: rendering was interrupted; run "
                "the command again, which renders the others"
            )
        self.images, self.labels, self.instances = _arrays(folder, self.set, "r")
        lines = (folder / _FACTS).read_text().splitlines()
        self.facts = [Facts(**json.loads(line)) for line in lines]

    def __len__(self) -> int:
        return self.set.count


def render_scenes(folder: Path, wanted: SceneSet) -> None:
    """Render scenes into a folder; those that an interrupted run has rendered are kept.

    Raises:
        ValueError: the folder holds other scenes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / _RECORD
    if record.is_file() and (found := SceneSet(**json.loads(record.read_text()))) != wanted:
        raise ValueError(
            f"{folder} holds other scenes ({found}) than those requested ({wanted}); name another "
            "folder or delete this one"
        )
    if not record.is_file():
        _arrays(folder, wanted, "w+")
        with atomic_write(record) as file:
            file.write(json.dumps(asdict(wanted), indent=2).encode())
    images, labels, instances = _arrays(folder, wanted, "r+")
    first = _done(folder)
    facts_file = folder / _FACTS
    lines = facts_file.read_text().splitlines()[:first] if first else []
    bar = tqdm(range(first, wanted.count), "render", wanted.count, initial=first, mininterval=5)
    for index in bar:
        scene = pretraining_scene(wanted.seed, wanted.split, index, (wanted.height, wanted.width))
        images[index], labels[index] = scene.rendered.image, scene.rendered.label
        # a canvas has at most 255 surfaces, so the numbers of its objects fit
        instances[index] = scene.rendered.instances.astype(np.uint8)
        lines.append(json.dumps(asdict(Facts.of(scene))))
        if (index + 1) % _SAVE_EVERY == 0 or index + 1 == wanted.count:
            for array in (images, labels, instances):
                array.flush()
            with atomic_write(facts_file) as file:
                file.write("\n".join(lines).encode())
            with atomic_write(folder / _DONE) as file:
                file.write(str(index + 1).encode())


def _done(folder: Path) -> int:
    """Number of scenes that are written."""
    file = folder / _DONE
    return int(file.read_text()) if file.is_file() else 0


def _arrays(
    folder: Path, scenes: SceneSet, mode: Literal["r", "r+", "w+"]
) -> list[np.memmap[Any, np.dtype[np.uint8]]]:
    """Images, labels and instances as memory maps."""
    shape = (scenes.count, scenes.height, scenes.width)
    shapes = {"images": (*shape, 3), "labels": shape, "instances": shape}
    return [
        np.lib.format.open_memmap(folder / f"{name}.npy", mode, np.uint8, full)
        for name, full in shapes.items()
    ]
