"""Run a model over datasets and score its class maps."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clouds import comm
from clouds.d2 import CfgNode, DatasetEvaluator
from clouds.data.build import build_test_loader
from clouds.data.datasets import DatasetSpec, get_dataset
from clouds.data.label_space import CITYSCAPES_19, IGNORE
from clouds.data.structures import Record
from clouds.device import autocast
from clouds.evaluation.confusion import ConfusionMatrix
from clouds.evaluation.protocols import Segmenter, build_protocol
from clouds.evaluation.pseudo_labels import PseudoLabelResult, inspect_pseudo_labels
from clouds.evaluation.report import DatasetResult, Results, describe_run, write_results
from clouds.modeling.postprocessing import class_map
from clouds.visualizer import compare

if TYPE_CHECKING:
    from clouds.modeling.meta_arch.clouds import CLOUDS

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]

_SYNTHIA = "synthia"
_SECONDS_BETWEEN_LINES = 30.0


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

    To be called by every process; the images are shared out among them and the counts summed. The
    model is evaluated under the autocast of SOLVER.AMP and left in the mode in which it came.

    Args:
        cfg: TEST, DATASETS, SOLVER.AMP, DATALOADER.NUM_WORKERS and OUTPUT_DIR count.
        model: has `segment` (and `forward`, for sliding windows), see `protocols.Segmenter`; may
            be DistributedDataParallel.
        names: datasets; None: DATASETS.TEST.
        weights: file that the model's weights were read from, for results.json; None:
            MODEL.WEIGHTS.
        iteration: training iteration after which this is, for results.json.
        pseudo_labels: look at what teacher and refiner make of the generated images too.

    Returns:
        The same results on every process.

    Raises:
        FileNotFoundError, ValueError: no dataset, an unknown one, or one with missing, broken or
            unlabelled files.
    """
    names = tuple(cfg.DATASETS.TEST if names is None else names)
    if not names:
        raise ValueError("there is nothing to evaluate on: DATASETS.TEST is empty")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"DATASETS.TEST names {', '.join(doubled)} more than once")
    for name in names:
        _labelled_records(get_dataset(name))  # before hours go into the datasets in front of it
    datasets = tuple(evaluate_dataset(cfg, model, name) for name in names)
    inspected: tuple[PseudoLabelResult, ...] = ()
    if pseudo_labels:
        with _evaluating(cfg, model) as segmenter:
            inspected = inspect_pseudo_labels(cfg, cast("CLOUDS", segmenter))
    results = Results(cfg.TEST.PROTOCOL, datasets, inspected)
    if comm.is_main_process():
        logger.info("protocol '%s':\n%s", results.protocol, results.table())
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        run = describe_run(cfg, bare, weights=weights, iteration=iteration)
        logger.info("results in %s", write_results(results, run, cfg.OUTPUT_DIR))
    return results


def evaluate_dataset(cfg: CfgNode, model: nn.Module, name: str) -> DatasetResult:
    """Score a model on one dataset; see `evaluate`."""
    dataset = get_dataset(name)
    protocol = build_protocol(cfg)
    rank, world_size = comm.get_rank(), comm.get_world_size()
    loader = build_test_loader(
        dataset, protocol.prepare, cfg.DATALOADER.NUM_WORKERS, rank, world_size
    )
    numbers = _picture_numbers(_labelled_records(dataset), cfg.TEST.PICTURES)
    scores = SemSegEvaluator(name)
    pictures: dict[int, UInt8Array] = {}
    start = time.perf_counter()
    with _evaluating(cfg, model) as segmenter:
        for sample in _with_progress(loader, name):
            seen = {key: value for key, value in sample.items() if key != "label"}
            prediction = protocol.predict(segmenter, seen)
            scores.process([sample], [{"sem_seg": prediction}])
            if sample["file_name"] in numbers:
                pictures[numbers[sample["file_name"]]] = _panel(sample, prediction)
    shares = comm.all_gather((scores.images, pictures))
    result = DatasetResult.from_confusion(
        name,
        scores.confusion.all_reduce(),
        dataset.classes_present,
        sixteen=_sixteen_classes(cfg, name),
        images=sum(images for images, _ in shares),
        seconds=time.perf_counter() - start,
        pictures=_in_order([share for _, share in shares]),
    )
    if comm.is_main_process():
        rate = result.images_per_second
        logger.info("%s: mIoU %.2f, %d images, %.2f/s", name, result.miou, result.images, rate)
    return result


class SemSegEvaluator(DatasetEvaluator):
    """Scores predictions on one of our datasets; also for Detectron2's `inference_on_dataset`.

    Args:
        dataset_name: its labels and classes count.

    Attributes:
        confusion: counts of what this process has seen.
        images: how many images those are.
    """

    def __init__(self, dataset_name: str) -> None:
        self.dataset = get_dataset(dataset_name)
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.confusion = ConfusionMatrix(CITYSCAPES_19.num_classes)
        self.images = 0
        self._records: dict[str, Record] | None = None

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: samples; the label is their "label" (H, W), or else is read from the dataset by
                their "file_name".
            outputs: "sem_seg" of each: scores (C, h, w) of any size, or a class map (H, W).

        Raises:
            ValueError: the dataset has no such file or no label of it; a class map of another size
                than its label, or with values that are no classes.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            prediction: Tensor = output["sem_seg"]
            label = sample["label"] if "label" in sample else self._read_label(sample["file_name"])
            if prediction.ndim == 3:
                prediction = class_map(prediction, (int(label.shape[0]), int(label.shape[1])))
            try:
                self.confusion.update(prediction, label)
            except ValueError as error:
                raise ValueError(f"{sample['file_name']}: {error}") from error
            self.images += 1

    def _read_label(self, file_name: str) -> Tensor:
        if self._records is None:
            self._records = {str(record.image): record for record in self.dataset.records()}
        record = self._records.get(file_name)
        if record is None:
            raise ValueError(f"{file_name} is no image of {self.dataset.name}")
        return torch.from_numpy(self.dataset.read_label(record))

    def evaluate(self) -> dict[str, Any]:
        """Scores over all processes, in percent: {"sem_seg": {"mIoU": …, "IoU-road": …}}."""
        images = sum(comm.all_gather(self.images))
        result = DatasetResult.from_confusion(
            self.dataset.name,
            self.confusion.all_reduce(),
            self.dataset.classes_present,
            images=images,
        )
        return {"sem_seg": result.scores()}


@contextlib.contextmanager
def _evaluating(cfg: CfgNode, model: nn.Module) -> Iterator[Segmenter]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    device = next((p.device for p in bare.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in bare.modules()}
    bare.eval()
    try:
        # not inference_mode: what a model caches meanwhile (text features) is used in training
        with torch.no_grad(), autocast(cfg, device):
            yield cast(Segmenter, bare)
    finally:
        for module, training in modes.items():
            module.training = training


def _with_progress(loader: Any, name: str) -> Any:
    """A bar on the main process; into a file, a line now and then."""
    quiet = not sys.stderr.isatty()
    return tqdm(
        loader,
        desc=name,
        unit="image",
        mininterval=_SECONDS_BETWEEN_LINES if quiet else 0.1,
        disable=not comm.is_main_process(),
        dynamic_ncols=True,
    )


def _labelled_records(dataset: DatasetSpec) -> list[Record]:
    records = dataset.records()
    for record in records:
        if record.label is None:
            raise ValueError(
                f"dataset {dataset.name}: {record.image} has no label, so there is nothing to "
                "score a prediction on"
            )
    return records


def _sixteen_classes(cfg: CfgNode, name: str) -> tuple[int, ...] | None:
    """SYNTHIA's classes, when it is what is evaluated on or trained on."""
    if _SYNTHIA not in (name, *cfg.DATASETS.TRAIN):
        return None
    return get_dataset(_SYNTHIA).classes_present


def _picture_numbers(records: Sequence[Record], wanted: int) -> dict[str, int]:
    """Which images are drawn: evenly spaced ones, by file, with their number among them."""
    count = min(wanted, len(records))
    chosen = [records[(2 * i + 1) * len(records) // (2 * count)] for i in range(count)]
    return {str(record.image): i for i, record in enumerate(chosen)}


def _panel(sample: Mapping[str, Any], prediction: Tensor) -> UInt8Array:
    label: UInt8Array = sample["label"].numpy()
    predicted = prediction.cpu().numpy().astype(np.uint8)
    scored = label != IGNORE
    right = int(np.sum((predicted == label) & scored)) / max(1, int(np.sum(scored)))
    file = sample["file_name"].replace("\\", "/").split("/")[-1]
    title = f"{sample['dataset']} · {file} · {100 * right:.1f} % of pixels right"
    image = sample["image"].permute(1, 2, 0).numpy()
    return compare(image, label, predicted, title=title)


def _in_order(shares: Sequence[Mapping[int, UInt8Array]]) -> list[UInt8Array]:
    pictures = {number: picture for share in shares for number, picture in share.items()}
    return [pictures[number] for number in sorted(pictures)]
