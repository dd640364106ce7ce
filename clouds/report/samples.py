"""Images of a report: which are shown, and their predictions by the runs' checkpoints."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clouds.data.datasets import Datasets
from clouds.data.label_space import LabelSpace
from clouds.evaluation.evaluator import PredictedImage, predict_image
from clouds.evaluation.image_scores import relative_names
from clouds.inference.load import load
from clouds.inference.segmenter import Segmenter
from clouds.report.run import Run

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]

TOLERANCE = 0.5
"""Difference in percent between the scores of evaluation and report that needs no note: devices
and numbers of threads round in their own ways."""


@dataclass(frozen=True)
class Choice:
    """An image that is shown, and why, such as `worst of joint`."""

    file: str
    reasons: tuple[str, ...]


@dataclass
class Sample:
    """An image with the predictions of the runs that have one.

    Attributes:
        dataset: its dataset.
        choice: its file.
        label_space: of `label` and `predictions`.
        image: (H, W, 3) RGB.
        label: (h, w) train ids.
        predictions: (h, w) train ids, by the name of the run.
    """

    dataset: str
    choice: Choice
    label_space: LabelSpace
    image: UInt8Array
    label: UInt8Array
    predictions: dict[str, UInt8Array] = field(default_factory=dict)


def choose(runs: Sequence[Run], dataset: str, count: int) -> list[Choice]:
    """The best and worst images of the last run, and those that differ most from the first run.

    Args:
        runs: those with scores of the images of `dataset` count.
        dataset: its name.
        count: images of each kind.
    """
    scored = [run for run in runs if run.image_scores.get(dataset)]
    if not scored or count < 1:
        return []
    last = _defined(scored[-1], dataset)
    ordered = sorted(last, key=lambda file: (last[file], file))
    kinds = {
        f"best of {scored[-1].name}": ordered[::-1][:count],
        f"worst of {scored[-1].name}": ordered[:count],
    }
    if len(scored) > 1:
        first = _defined(scored[0], dataset)
        gains = {file: last[file] - first[file] for file in ordered if file in first}
        by_gain = sorted(gains, key=lambda file: (-gains[file], file))
        pair = f"{scored[0].name} to {scored[-1].name}"
        kinds[f"largest gain from {pair}"] = [f for f in by_gain if gains[f] > 0][:count]
        kinds[f"largest loss from {pair}"] = [f for f in by_gain[::-1] if gains[f] < 0][:count]
    files = dict.fromkeys(file for chosen in kinds.values() for file in chosen)
    return [
        Choice(file, tuple(reason for reason, chosen in kinds.items() if file in chosen))
        for file in files
    ]


def _defined(run: Run, dataset: str) -> dict[str, float]:
    scores = run.image_scores[dataset]
    return {file: value for file, value in scores.items() if value is not None}


def predict(
    runs: Sequence[Run], choices: Mapping[str, Sequence[Choice]], device: str | None
) -> tuple[list[Sample], list[str]]:
    """Predict the chosen images of each dataset with the checkpoint of each run.

    Args:
        device: see `clouds.load`.

    Returns:
        The samples, and notes about images, datasets and checkpoints that cannot be used.
    """
    samples: dict[tuple[str, str], Sample] = {}
    notes: list[str] = []
    for run in runs:
        wanted = {name: chosen for name, chosen in choices.items() if name in run.datasets}
        if not any(wanted.values()):
            continue
        try:
            segmenter = _load(run, device)
        except (OSError, TypeError, ValueError, ImportError, KeyError) as error:
            notes.append(f"{run.name}: no predictions, since {_reason(error)}")
            continue
        logger.info("%s: predicting %d images", run.name, sum(map(len, wanted.values())))
        for name, chosen in wanted.items():
            try:
                notes += _add_predictions(samples, run, segmenter, name, chosen)
            except (OSError, ValueError, ImportError, KeyError, torch.OutOfMemoryError) as error:
                notes.append(f"{run.name}, {name}: images are left out, since {_reason(error)}")
    for note in notes:
        logger.warning("%s", note)
    order = [(name, choice.file) for name, chosen in choices.items() for choice in chosen]
    return [samples[key] for key in order if key in samples], notes


def _add_predictions(
    samples: dict[tuple[str, str], Sample],
    run: Run,
    segmenter: Segmenter,
    dataset: str,
    choices: Sequence[Choice],
) -> list[str]:
    """Add a run's predictions to the samples of a dataset; returns notes on other scores."""
    spec = Datasets.from_config(segmenter.cfg).get(dataset)
    records = spec.records()
    names = relative_names([record.image for record in records])
    by_name = {names[str(record.image)]: record for record in records}
    notes = []
    for choice in choices:
        if choice.file not in by_name:
            raise ValueError(f"{choice.file} is not in {spec.root}")
        found = predict_image(segmenter.cfg, segmenter.model, spec, by_name[choice.file])
        new = Sample(dataset, choice, spec.label_space, found.image, found.label)
        sample = samples.setdefault((dataset, choice.file), new)
        if sample.label_space.names != spec.label_space.names:
            raise ValueError("the model's classes are not those of the first run")
        sample.predictions[run.name] = found.prediction
        notes += _note_on_score(run, dataset, choice, found)
    return notes


def _load(run: Run, device: str | None) -> Segmenter:
    """The evaluated checkpoint of a run with the config of the evaluation."""
    file = (run.results.get("weights") or {}).get("file")
    if not file:
        raise ValueError(
            "results.json names no checkpoint: the evaluated weights were not saved, or random"
        )
    weights = Path(file)
    if not weights.is_file():  # the run was moved, or written from another working directory
        weights = run.folder / weights.name
    if not weights.is_file():
        raise FileNotFoundError(f"its checkpoint '{file}' does not exist")
    with tempfile.TemporaryDirectory() as folder:
        config_file = Path(folder, "config.yaml")  # YAML includes JSON
        config_file.write_text(json.dumps(run.results.get("config") or {}), "utf-8")
        return load(weights, config_file, device=device)


def _note_on_score(run: Run, dataset: str, choice: Choice, found: PredictedImage) -> list[str]:
    """A note if the score of an image is not that of the evaluation."""
    before = run.image_scores.get(dataset, {}).get(choice.file)
    if before is None or abs(before - found.score.miou) <= TOLERANCE:
        return []
    return [
        f"{run.name}, {dataset}, {choice.file}: mIoU {before:.1f} % in the evaluation, "
        f"{found.score.miou:.1f} % when predicted for this report; checkpoint or data have changed"
    ]


def _reason(error: Exception) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
