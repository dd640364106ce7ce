"""Evaluation of a model on datasets: runs a protocol and scores the predicted class maps."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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
from clouds.data.datasets import Datasets, DatasetSpec, dataset_names, get_dataset
from clouds.data.held_out import split
from clouds.data.label_space import LabelSpace
from clouds.data.label_statistics import check_labels
from clouds.data.structures import Record
from clouds.device import autocast
from clouds.evaluation.confusion import ConfusionMatrix
from clouds.evaluation.protocols import Protocol, Segmenter, build_protocol, protocol_name
from clouds.evaluation.pseudo_labels import (
    PseudoLabelResult,
    evaluate_pseudo_labels,
    evenly_spaced,
    merge_by_number,
)
from clouds.evaluation.report import DatasetResult, Results, describe_run, write_results
from clouds.modeling.meta_arch.clouds import CLOUDS
from clouds.modeling.postprocessing import class_map
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
    results = Results(protocol_name(cfg), datasets, pseudo_label_results)
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
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise ValueError(f"DATASETS.TEST names {', '.join(repeated)} more than once")
    datasets, protocol = Datasets.from_config(cfg), build_protocol(cfg)
    for name in names:
        protocol.check_dataset(name)
        dataset = datasets.get(name)
        _labeled_records(dataset)
        check_labels(dataset, need_class=False)


def evaluate_held_out(cfg: CfgNode, model: nn.Module) -> Results:
    """Score a model on the images of DATASETS.SOURCE_VAL_FRACTION, which training leaves out.

    A collective operation, under the protocol 'native' without test-time augmentation, since that
    is defined for every dataset. Nothing is written.

    Raises: see `evaluate`.
    """
    fraction = cfg.DATASETS.SOURCE_VAL_FRACTION
    for key, value in {"PROTOCOL": "native", "AUG.ENABLED": False, "VISUALIZED_IMAGES": 0}.items():
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
    evaluator = SemSegEvaluator(dataset)
    panels: dict[int, UInt8Array] = {}
    start = time.perf_counter()
    with _evaluation_mode(cfg, model) as segmenter:
        for sample in _with_progress(loader, name):
            unlabeled = {key: value for key, value in sample.items() if key != "label"}
            prediction = _predict(protocol, segmenter, unlabeled)
            evaluator.process([sample], [{"sem_seg": prediction}])
            if sample["file_name"] in panel_numbers:
                panel = _panel(sample, prediction, dataset.label_space)
                panels[panel_numbers[sample["file_name"]]] = panel
    gathered = comm.all_gather((evaluator.images, panels))
    result = DatasetResult.from_confusion(
        name,
        dataset.label_space,
        evaluator.confusion.all_reduce(),
        dataset.classes_present,
        subsets=_class_subsets(dataset, cfg.DATASETS.TRAIN),
        unmapped_classes=dataset.unmapped_classes,
        images=sum(images for images, _ in gathered),
        seconds=time.perf_counter() - start,
        panels=merge_by_number([panels for _, panels in gathered]),
    )
    if comm.is_main_process():
        rate = result.images_per_second
        logger.info("%s: mIoU %.2f, %d images, %.2f/s", name, result.miou, result.images, rate)
    return result


class SemSegEvaluator(DatasetEvaluator):
    """Scores predictions on a dataset; can be used in Detectron2's `inference_on_dataset`.

    Attributes:
        confusion: counts over the images that this process has evaluated.
        images: number of these images.

    Args:
        dataset: in the label space of the model (`Datasets.get`); or the name of a dataset whose
            own label space is that of the model.
    """

    def __init__(self, dataset: DatasetSpec | str) -> None:
        self.dataset = get_dataset(dataset) if isinstance(dataset, str) else dataset
        self.reset()

    def reset(self) -> None:
        """Discard all counts."""
        label_space = self.dataset.label_space
        self.confusion = ConfusionMatrix(label_space.num_classes, label_space.ignore)
        self.images = 0
        self._records: dict[str, Record] | None = None

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Count the pixels of one batch.

        Args:
            inputs: samples. The label is "label" (H, W) if there is one, otherwise it is read from
                the dataset by "file_name".
            outputs: "sem_seg" of each: scores (C, h, w) of any size, or a class map (H, W).

        Raises:
            ValueError: the file is not in the dataset or has no label; scores are not finite; a
                class map differs from its label in size or has values that are not classes.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            prediction: Tensor = output["sem_seg"]
            label = sample["label"] if "label" in sample else self._read_label(sample["file_name"])
            if prediction.ndim == 3:
                if not prediction.isfinite().all():
                    raise ValueError(
                        f"{sample['file_name']}: the scores of the model are not finite; its "
                        "weights may have diverged. Use an earlier checkpoint."
                    )
                prediction = class_map(prediction, (int(label.shape[0]), int(label.shape[1])))
            try:
                self.confusion.update(prediction, label)
            except ValueError as error:
                raise ValueError(f"{sample['file_name']}: {error}") from error
            self.images += 1

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
        )
        return {"sem_seg": result.scores()}


def _predict(protocol: Protocol, model: Segmenter, sample: dict[str, Any]) -> Tensor:
    """The class map of a sample; if memory runs out, once more in the smallest pieces.

    The pieces are those of TEST.MASKS_AT_ONCE, which change scores by rounding only.

    Raises:
        torch.OutOfMemoryError: there is still too little memory.
    """
    try:
        return protocol.predict(model, sample)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
    # outside of the handler, where the traceback no longer keeps tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    file = sample["file_name"]
    logger.warning("%s: out of memory; trying once more in smaller pieces (%s)", file, reason)
    pieces: Any = model
    before = getattr(model, "masks_at_once", None)
    try:
        if before is not None:
            pieces.masks_at_once = 1
        return protocol.predict(model, sample)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        height, width = sample["image"].shape[-2:]
        raise torch.OutOfMemoryError(
            f"{file}: not enough memory for this image of {width}x{height} pixels, also with "
            f"TEST.MASKS_AT_ONCE 1: {reason}. Set SOLVER.AMP.ENABLED True, or evaluate by windows "
            "(TEST.PROTOCOL slide, TEST.SLIDE.CROP_SIZE lower) or at a lower TEST.SHORT_SIDE, "
            "whose scores are others; or use a device with more memory (MODEL.DEVICE)."
        ) from error
    finally:
        if before is not None:
            pieces.masks_at_once = before


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory of a device or of the host could not be allocated."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)


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
