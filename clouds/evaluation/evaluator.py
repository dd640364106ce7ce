"""Evaluation of a model on datasets: runs a protocol and scores the predicted class maps."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clouds import comm
from clouds.config.config import with_value
from clouds.d2 import CfgNode, DatasetEvaluator
from clouds.data.build import build_test_loader
from clouds.data.dataset_mapper import EvaluationMapper, read_image_and_label
from clouds.data.datasets import Datasets, DatasetSpec, dataset_names, get_dataset
from clouds.data.held_out import split
from clouds.data.label_space import LabelSpace
from clouds.data.label_statistics import check_labels
from clouds.data.structures import Record
from clouds.device import autocast
from clouds.evaluation.anomaly import evaluate_anomaly_set, list_anomaly_set
from clouds.evaluation.confusion import ConfusionMatrix
from clouds.evaluation.image_scores import ImageScore, in_order, relative_names
from clouds.evaluation.metrics import METRICS
from clouds.evaluation.prediction import predict_in_pieces
from clouds.evaluation.protocols import Segmenter, build_protocol, protocol_name
from clouds.evaluation.pseudo_labels import (
    PseudoLabelResult,
    evaluate_pseudo_labels,
    evenly_spaced,
    merge_by_number,
)
from clouds.evaluation.report import DatasetResult, Results, describe_run, write_results
from clouds.messages import repeated
from clouds.modeling.meta_arch.clouds import CLOUDS
from clouds.modeling.postprocessing import class_map, class_map_with_confidence
from clouds.visualizer import compare

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]

_LOG_INTERVAL = 30.0
"""Seconds between two updates of the progress bar when it is not on a terminal."""


def evaluate(
    cfg: CfgNode,
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    weights: str | None = None,
    iteration: int | None = None,
    pseudo_labels: bool = False,
) -> Results:
    """Score a model on several datasets; log the table and write OUTPUT_DIR/results.json.

    A collective operation: every process must call it. The images are distributed among the
    processes and the counts summed. The model is evaluated under the autocast of SOLVER.AMP; the
    training mode of each of its modules is restored afterwards.

    Args:
        cfg: uses TEST, DATASETS, SOLVER.AMP, DATALOADER and OUTPUT_DIR.
        model: has `segment` (and `forward`, for sliding windows), see `protocols.Segmenter`; may
            be DistributedDataParallel.
        names: datasets; None: DATASETS.TEST.
        weights: file of the model's weights, for results.json; None: MODEL.WEIGHTS.
        iteration: training iteration after which the model is evaluated, for results.json.
        pseudo_labels: also evaluate the pseudo-labels of the generated training images.

    Returns:
        The same results on every process.

    Raises:
        FileNotFoundError, ValueError: there is no dataset, a dataset is unknown, or files of one
            are missing, broken or unlabeled.
        TimeoutError: an image was not read within DATALOADER.TIMEOUT.
        torch.OutOfMemoryError: on any device; the message names the image.
    """
    names = tuple(cfg.DATASETS.TEST if names is None else names)
    check_test_data(cfg, names)
    datasets = tuple(evaluate_dataset(cfg, model, name) for name in names)
    pseudo_label_results: tuple[PseudoLabelResult, ...] = ()
    if pseudo_labels:
        with _evaluation_mode(cfg, model) as segmenter:
            pseudo_label_results = evaluate_pseudo_labels(cfg, cast(CLOUDS, segmenter))
    with _evaluation_mode(cfg, model) as segmenter:
        anomaly = tuple(
            evaluate_anomaly_set(build_protocol(cfg), segmenter, name)
            for name in cfg.TEST.ANOMALY_SETS
        )
    results = Results(protocol_name(cfg), datasets, pseudo_label_results, anomaly)
    if comm.is_main_process():
        logger.info("protocol '%s':\n%s", results.protocol, results.table())
        run = describe_run(cfg, _unwrap(model), weights=weights, iteration=iteration)
        if run["selection"]:
            logger.info("%s", run["selection"])
        logger.info("results in %s", write_results(results, run, cfg.OUTPUT_DIR))
    return results


def check_test_data(cfg: CfgNode, names: Sequence[str]) -> None:
    """Report missing files and useless labels before the first evaluation, before a model is built.

    Raises:
        FileNotFoundError, ValueError: see `evaluate`.
    """
    if not names:
        raise ValueError("no datasets to evaluate on: DATASETS.TEST is empty")
    if twice := repeated(names):
        raise ValueError(f"DATASETS.TEST names {', '.join(twice)} more than once")
    datasets, protocol = Datasets.from_config(cfg), build_protocol(cfg)
    for name in names:
        protocol.check_dataset(name)
        dataset = datasets.get(name)
        _labeled_records(dataset)
        check_labels(dataset, need_class=False)
    anomaly_sets = [Path(name).name for name in cfg.TEST.ANOMALY_SETS]
    for name, folder in zip(anomaly_sets, cfg.TEST.ANOMALY_SETS, strict=True):
        if anomaly_sets.count(name) > 1 or name in names:
            raise ValueError(
                f"TEST.ANOMALY_SETS has {folder!r}: {name!r} is the name of another set or "
                "dataset, too. Results are by the names of folders; rename one, or use a link."
            )
        protocol.check_dataset(name)
        list_anomaly_set(folder)


def evaluate_held_out(cfg: CfgNode, model: nn.Module) -> Results:
    """Score a model on the images of DATASETS.SOURCE_VAL_FRACTION, which training leaves out.

    A collective operation, under the protocol 'native' without test-time augmentation, since that
    is defined for every dataset, and without TEST.METRICS. Nothing is written.

    Raises: see `evaluate`.
    """
    fraction = cfg.DATASETS.SOURCE_VAL_FRACTION
    plain = {"PROTOCOL": "native", "AUG.ENABLED": False, "VISUALIZED_IMAGES": 0, "METRICS": ()}
    for key, value in plain.items():
        cfg = with_value(cfg, f"TEST.{key}", value)
    datasets = Datasets.from_config(cfg)
    scores = []
    for name in datasets.labelled:
        held_out = split(datasets.get(name).records(), fraction, name)[1]
        scores.append(evaluate_dataset(cfg, model, name, held_out))
    results = Results(protocol_name(cfg), tuple(scores))
    if comm.is_main_process():
        logger.info("held-out images of the source:\n%s", results.table())
    return results


def evaluate_dataset(
    cfg: CfgNode, model: nn.Module, name: str, records: Sequence[Record] | None = None
) -> DatasetResult:
    """Score a model on one dataset, or on some of its images; see `evaluate`."""
    dataset = Datasets.from_config(cfg).get(name)
    protocol = build_protocol(cfg)
    rank, world_size = comm.get_rank(), comm.get_world_size()
    workers, timeout = cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.TIMEOUT
    records = _labeled_records(dataset) if records is None else records
    options = (workers, rank, world_size, timeout, records)
    loader = build_test_loader(dataset, protocol.prepare, *options)
    selected = evenly_spaced(records, cfg.TEST.VISUALIZED_IMAGES)
    panel_numbers = {str(record.image): i for i, record in enumerate(selected)}
    evaluator = SemSegEvaluator(dataset, cfg.TEST.METRICS)
    panels: dict[int, UInt8Array] = {}
    start = time.perf_counter()
    with _evaluation_mode(cfg, model) as segmenter:
        for sample in _with_progress(loader, name):
            unlabeled = {key: value for key, value in sample.items() if key != "label"}
            prediction, confidence = predict_in_pieces(
                protocol, segmenter, unlabeled, with_confidence=evaluator.needs_confidence
            )
            evaluator.process([sample], [{"sem_seg": prediction, "confidence": confidence}])
            if sample["file_name"] in panel_numbers:
                panel = _panel(sample, prediction, dataset.label_space)
                panels[panel_numbers[sample["file_name"]]] = panel
    gathered = comm.all_gather((evaluator.images, panels, evaluator.image_scores))
    result = DatasetResult.from_confusion(
        name,
        dataset.label_space,
        evaluator.confusion.all_reduce(),
        dataset.classes_present,
        subsets=_class_subsets(dataset, cfg.DATASETS.TRAIN),
        unmapped_classes=dataset.unmapped_classes,
        metrics=evaluator.metric_scores(),
        images=sum(images for images, _, _ in gathered),
        seconds=time.perf_counter() - start,
        panels=merge_by_number([panels for _, panels, _ in gathered]),
        image_scores=in_order(
            relative_names([record.image for record in records]),
            [scores for _, _, scores in gathered],
        ),
    )
    if comm.is_main_process():
        rate = result.images_per_second
        logger.info("%s: mIoU %.2f, %d images, %.2f/s", name, result.miou, result.images, rate)
    return result


@dataclass(frozen=True)
class PredictedImage:
    """One image with its prediction, as it is evaluated.

    Attributes:
        image: (H, W, 3) RGB, as it is in the dataset.
        label: (H', W') uint8 train ids on which the prediction is scored.
        prediction: (H', W') uint8 train ids.
        score: of the prediction.
    """

    image: UInt8Array
    label: UInt8Array
    prediction: UInt8Array
    score: ImageScore


def predict_image(
    cfg: CfgNode, model: nn.Module, dataset: DatasetSpec, record: Record
) -> PredictedImage:
    """Predict and score one image as `evaluate_dataset` does.

    Raises:
        OSError, ValueError: a file is missing or broken; scores or labels are no valid ones.
        torch.OutOfMemoryError: on any device.
    """
    protocol = build_protocol(cfg)
    sample: dict[str, Any] = {**EvaluationMapper(protocol.prepare)(record)}
    label = sample.pop("label")
    with _evaluation_mode(cfg, model) as segmenter:
        prediction, _ = predict_in_pieces(protocol, segmenter, sample)
    evaluator = SemSegEvaluator(dataset)
    evaluator.process([{**sample, "label": label}], [{"sem_seg": prediction}])
    return PredictedImage(
        image=read_image_and_label(record)[0],
        label=label.numpy(),
        prediction=prediction.cpu().numpy().astype(np.uint8),
        score=evaluator.image_scores[0],
    )


class SemSegEvaluator(DatasetEvaluator):
    """Scores predictions on a dataset; can be used in Detectron2's `inference_on_dataset`.

    Attributes:
        confusion: counts over the images that this process has evaluated.
        images: number of these images.
        image_scores: of each of them; its file is the sample's "file_name", empty without.

    Args:
        dataset: in the label space of the model (`Datasets.get`); or the name of a dataset whose
            own label space is that of the model.
        metrics: names of further scores, see TEST.METRICS.
    """

    def __init__(self, dataset: DatasetSpec | str, metrics: Sequence[str] = ()) -> None:
        self.dataset = get_dataset(dataset) if isinstance(dataset, str) else dataset
        self._names = tuple(metrics)
        self.reset()

    @property
    def needs_confidence(self) -> bool:
        """Whether outputs need a "confidence"."""
        return any(metric.needs_confidence for metric in self.metrics)

    def reset(self) -> None:
        """Discard all counts."""
        label_space = self.dataset.label_space
        self.confusion = ConfusionMatrix(label_space.num_classes, label_space.ignore)
        self.metrics = [METRICS[name](label_space) for name in self._names]
        self.images = 0
        self.image_scores: list[ImageScore] = []
        self._records: dict[str, Record] | None = None

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Count the pixels of one batch.

        Args:
            inputs: samples. The label is "label" (H, W) if there is one, otherwise it is read from
                the dataset by "file_name".
            outputs: "sem_seg" of each: scores (C, h, w) of any size, or a class map (H, W); and
                "confidence", float (H, W) in [0, 1], of a class map if a metric needs it.

        Raises:
            ValueError: the file is not in the dataset or has no label; scores are not finite; a
                class map differs from its label in size or has values that are not classes.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            prediction: Tensor = output["sem_seg"]
            label = sample["label"] if "label" in sample else self._read_label(sample["file_name"])
            confidence: Tensor | None = output.get("confidence")
            if prediction.ndim == 3:
                prediction, confidence = self._classify(sample, prediction, label)
            counts = ConfusionMatrix(self.confusion.num_classes, self.confusion.ignore)
            try:
                counts.update(prediction, label)
                for metric in self.metrics:
                    metric.update(prediction, label.to(prediction.device), confidence)
            except ValueError as error:
                raise ValueError(f"{sample['file_name']}: {error}") from error
            self.confusion.add(counts)
            file, classes = str(sample.get("file_name", "")), self.dataset.classes_present
            self.image_scores.append(ImageScore.from_confusion(file, counts, classes))
            self.images += 1

    def _classify(
        self, sample: Mapping[str, Any], scores: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Classes of scores at the size of the label, and their confidence if it is needed."""
        if not scores.isfinite().all():
            raise ValueError(
                f"{sample['file_name']}: the scores of the model are not finite; its weights may "
                "have diverged. Use an earlier checkpoint."
            )
        size = (int(label.shape[0]), int(label.shape[1]))
        if self.needs_confidence:
            return class_map_with_confidence(scores, size)
        return class_map(scores, size), None

    def metric_scores(self) -> dict[str, float]:
        """Scores of the metrics over all processes, in percent; a collective operation."""
        scores: dict[str, float] = {}
        for metric in self.metrics:
            scores |= metric.all_reduce().scores(self.dataset.classes_present)
        return scores

    def _read_label(self, file_name: str) -> Tensor:
        if self._records is None:
            self._records = {str(record.image): record for record in self.dataset.records()}
        record = self._records.get(str(Path(file_name)))
        if record is None:
            raise ValueError(f"{file_name} is not an image of {self.dataset.name}")
        return torch.from_numpy(self.dataset.read_label(record))

    def evaluate(self) -> dict[str, Any]:
        """Scores over all processes, in percent: {"sem_seg": {"mIoU": …, "IoU-road": …}}."""
        result = DatasetResult.from_confusion(
            self.dataset.name,
            self.dataset.label_space,
            self.confusion.all_reduce(),
            self.dataset.classes_present,
            metrics=self.metric_scores(),
        )
        return {"sem_seg": result.scores()}


@contextlib.contextmanager
def _evaluation_mode(cfg: CfgNode, model: nn.Module) -> Iterator[Segmenter]:
    """The model in evaluation mode; the mode of each module is restored afterwards."""
    model = _unwrap(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # not inference_mode: tensors that the model caches (text features) are used in training
        with torch.no_grad(), autocast(cfg, device):
            yield cast(Segmenter, model)
    finally:
        for module, training in modes.items():
            module.training = training


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _with_progress(loader: Any, name: str) -> Any:
    """The loader with a progress bar on the main process."""
    return tqdm(
        loader,
        desc=name,
        unit="image",
        mininterval=0.1 if sys.stderr.isatty() else _LOG_INTERVAL,
        disable=not comm.is_main_process(),
        dynamic_ncols=True,
    )


def _labeled_records(dataset: DatasetSpec) -> list[Record]:
    records = dataset.records()
    for record in records:
        if record.label is None:
            raise ValueError(
                f"dataset {dataset.name}: {record.image} has no label, so predictions for it "
                "cannot be scored"
            )
    return records


def _class_subsets(
    dataset: DatasetSpec, training_datasets: Sequence[str]
) -> dict[int, tuple[int, ...] | None]:
    """Subsets of the dataset's label space for `DatasetResult.subset_miou`, by their size.

    They are the classes of the datasets with `report_mean_over_classes` in the same label space.
    None: neither training nor evaluation uses such a dataset.
    """
    subsets: dict[int, tuple[int, ...] | None] = {}
    for name in dataset_names():
        other = get_dataset(name)
        if other.report_mean_over_classes and other.label_space == dataset.label_space:
            classes = other.classes_present
            used = name == dataset.name or name in training_datasets
            subsets[len(classes)] = classes if used else subsets.get(len(classes))
    return subsets


def _panel(sample: Mapping[str, Any], prediction: Tensor, label_space: LabelSpace) -> UInt8Array:
    label: UInt8Array = sample["label"].numpy()
    predicted = prediction.cpu().numpy().astype(np.uint8)
    counted = label != label_space.ignore
    accuracy = int(np.sum((predicted == label) & counted)) / max(1, int(np.sum(counted)))
    file = sample["file_name"].replace("\\", "/").split("/")[-1]
    title = f"{sample['dataset']} · {file} · {100 * accuracy:.1f} % of the pixels correct"
    image = sample["image"].permute(1, 2, 0).numpy()
    return compare(image, label, predicted, label_space, title=title)
