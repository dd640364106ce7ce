"""Finding pixels of unknown objects by low confidence, on sets of SegmentMeIfYouCan's layout.

A set is a folder with `images/<name>.<suffix>` and `labels_masks/<name>_labels_semantic.png`, whose
pixels are 0 (known classes), 1 (anomaly) or 255 (not counted), as RoadAnomaly21 and FishyScapes
Lost & Found are published there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clouds import comm
from clouds.data.datasets.catalog import ROOT_VARIABLE, dataset_root
from clouds.data.reading import read_image, read_stored
from clouds.evaluation.curves import LEVELS, ScoreCounts, count_levels
from clouds.evaluation.prediction import predict_in_pieces
from clouds.evaluation.protocols import Protocol, Segmenter
from clouds.files import expand_user

logger = logging.getLogger(__name__)

IMAGES, LABELS, LABEL_SUFFIX = "images", "labels_masks", "_labels_semantic.png"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NORMAL, ANOMALY, NOT_COUNTED = 0, 1, 255

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class AnomalyResult:
    """Scores on one set, in percent; nan: it has no anomalies or no normal pixels.

    Attributes:
        name: name of its folder.
        aupr: average precision; anomalies are the positives.
        fpr95: false positive rate at a true positive rate of 95 %.
        auroc: area under the ROC curve.
        images: number of images with labels.
    """

    name: str
    aupr: float
    fpr95: float
    auroc: float
    images: int

    def to_dict(self) -> dict[str, float]:
        """Scores by name."""
        return {
            "AUPR": self.aupr,
            "FPR95": self.fpr95,
            "AUROC": self.auroc,
            "images": self.images,
        }

    def flat(self) -> dict[str, float]:
        """`<name>/AUPR`, `<name>/FPR95`, `<name>/AUROC`."""
        return {f"{self.name}/{k}": v for k, v in self.to_dict().items() if k != "images"}

    def line(self) -> str:
        """The scores in a sentence."""
        return (
            f"{self.name} ({self.images} images), anomalies by 1 - confidence: AUPR "
            f"{self.aupr:.1f}, FPR95 {self.fpr95:.1f}, AUROC {self.auroc:.1f} %."
        )


def list_anomaly_set(name: str) -> list[tuple[Path, Path]]:
    """Images and labels of a set, sorted; images without labels (test images) are left out.

    Args:
        name: its folder, relative to that of the datasets.

    Raises:
        FileNotFoundError: there is no such folder, or no image with a label in it.
    """
    folder = dataset_root() / expand_user(name)
    images = folder / IMAGES
    if not images.is_dir():
        raise FileNotFoundError(
            f"TEST.ANOMALY_SETS names {name!r}, but '{images}' is no folder. Expected are "
            f"{IMAGES}/<name>.png and {LABELS}/<name>{LABEL_SUFFIX} in '{folder}'; "
            f"${ROOT_VARIABLE} is the folder of all datasets."
        )
    found = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES)
    pairs = [(image, folder / LABELS / f"{image.stem}{LABEL_SUFFIX}") for image in found]
    labeled = [(image, label) for image, label in pairs if label.is_file()]
    if not labeled:
        raise FileNotFoundError(
            f"{name}: none of the {len(found)} images in '{images}' has a label, such as "
            f"'{folder / LABELS}/<name>{LABEL_SUFFIX}'"
        )
    return labeled


def read_mask(path: Path) -> UInt8Array:
    """A label of `NORMAL`, `ANOMALY` and `NOT_COUNTED`, (H, W).

    Raises:
        ValueError: it has other values, or several channels.
    """
    pixels, _ = read_stored(path)
    if pixels.ndim != 2:
        raise ValueError(f"{path}: a label with one channel is expected; it has {pixels.shape[2]}")
    others = np.setdiff1d(pixels, (NORMAL, ANOMALY, NOT_COUNTED))
    if others.size:
        raise ValueError(
            f"{path}: has the values {', '.join(map(str, others[:5].tolist()))}; allowed are "
            f"{NORMAL} (known), {ANOMALY} (anomaly) and {NOT_COUNTED} (not counted)"
        )
    return pixels.astype(np.uint8)


def evaluate_anomaly_set(protocol: Protocol, model: Segmenter, name: str) -> AnomalyResult:
    """Score a model on a set; a collective operation, which distributes the images.

    Args:
        protocol: gives the model's input; the score of a pixel is 1 minus the confidence.
        model: in evaluation mode.
        name: see `list_anomaly_set`.

    Raises:
        FileNotFoundError, ValueError: files are missing, broken or do not belong together.
    """
    pairs = list_anomaly_set(name)
    title = Path(name).name
    counts = torch.zeros(2, LEVELS, dtype=torch.int64)  # normal, anomaly
    for image_file, label_file in pairs[comm.get_rank() :: comm.get_world_size()]:
        image, mask = read_image(image_file), read_mask(label_file)
        if image.shape[:2] != mask.shape:
            raise ValueError(
                f"{label_file} has {mask.shape[1]}x{mask.shape[0]} pixels, its image "
                f"{image.shape[1]}x{image.shape[0]}"
            )
        pixels, scored = protocol.prepare(image, mask, title)
        assert scored is not None, "there is a label"
        sample = {
            "image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
            "height": scored.shape[0],
            "width": scored.shape[1],
            "file_name": str(image_file),
            "dataset": title,
        }
        _, confidence = predict_in_pieces(protocol, model, sample, with_confidence=True)
        assert confidence is not None
        truth = torch.from_numpy(scored).to(confidence.device)
        counted = truth != NOT_COUNTED
        try:
            found = count_levels(1 - confidence[counted].double(), truth[counted] == ANOMALY)
        except ValueError as error:
            raise ValueError(f"{image_file}: {error}") from error
        counts += found.cpu()
    normal, anomaly = torch.stack(comm.all_gather(counts)).sum(0)
    curves = ScoreCounts(positives=anomaly.numpy(), negatives=normal.numpy())
    result = AnomalyResult(
        title,
        100 * curves.average_precision(),
        100 * curves.false_positive_rate(),
        100 * curves.auroc(),
        len(pairs),
    )
    if comm.is_main_process():
        logger.info("%s", result.line())
    return result
