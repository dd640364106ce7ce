"""Evaluate Street-SAM: masks for points in true components, and labels it refines.

    python -m street_models.evaluate_sam

Images are those that `clouds make-demo-data` renders of the three looks that no training image has,
or, with `--held-out`, random looks on which settings may be chosen. The SAM is loaded and prompted
by the code that loads and prompts the large ones. Components are those of the true label, above
`--size-threshold` pixels. Refined labels are compared with those of a simulated teacher: true
labels with smoothed outlines and wrong blobs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from street_renderer.dataset_writer import Recipe, render_sample
from street_renderer.pretraining_style import pretraining_scene
from torch import Tensor
from tqdm import tqdm

from clouds.cli.command_line import user_errors_in_one_line
from clouds.config import get_cfg
from clouds.d2 import CfgNode
from clouds.data.label_space import CITYSCAPES_19, IGNORE
from clouds.evaluation.confusion import ConfusionMatrix
from clouds.self_training.refiners.base import PseudoLabel
from clouds.self_training.refiners.sam.backends import PointSam, build_point_sam
from clouds.self_training.refiners.sam.prompt_decoder import Prompts, prompts_at_once
from clouds.self_training.refiners.sam.prompts import (
    PointOptions,
    find_components,
    sample_points,
)
from clouds.self_training.refiners.sam.refiner import SamOptions, SamRefiner
from street_models.records import without_record, write_record
from street_models.weight_files import STREET_SAM

Bytes = npt.NDArray[np.uint8]

LOOKS = ("cityscapes_val", "bdd_val", "mapillary_val")
HELD_OUT = "held out"
AREAS = (100, 300, 1000, 3000, 10000)
"""Lower limits of the groups of component sizes, pixels."""


@dataclass(frozen=True)
class MaskScore:
    """IoU of the masks for one component.

    Attributes:
        class_id, area: of the component; area in pixels.
        chosen: IoU of the mask with the largest predicted IoU.
        best: IoU of the best of the three masks.
        predicted: predicted IoU of the chosen mask.
    """

    class_id: int
    area: int
    chosen: float
    best: float
    predicted: float


def scenes_of(
    name: str, count: int, seed: int, size: tuple[int, int]
) -> Iterator[tuple[Bytes, Bytes]]:
    """Images (H, W, 3) and labels (H, W) of one of `LOOKS`, or of `HELD_OUT` looks."""
    for index in range(count):
        if name == HELD_OUT:
            scene = pretraining_scene(seed, "val", index, size).rendered
        else:
            scene = render_sample(Recipe.of(name, seed, size), index)
        yield scene.image, scene.label


def config_of(model: str, weights: str, size_threshold: int) -> CfgNode:
    """A config whose MODEL.CLOUDS.SAM is a SAM with weights."""
    cfg = get_cfg()
    node = cfg.MODEL.CLOUDS.SAM
    node.MODEL, node.WEIGHTS, node.SIZE_THRESHOLD = model, weights, size_threshold
    return cfg


def to_tensor(image: Bytes) -> Tensor:
    """(H, W, 3) to (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def score_masks(
    sam: PointSam, image: Bytes, label: Bytes, options: SamOptions, seed: int
) -> list[MaskScore]:
    """Scores of all components of a true label above the size threshold."""
    components = find_components(label, options.size_threshold)
    if not len(components):
        return []
    points = sample_points(components, options.points, np.random.default_rng(seed))
    size = (int(label.shape[0]), int(label.shape[1]))
    [embedding] = sam.embed([to_tensor(image)])
    frame = sam.decoder.frame
    scores: list[MaskScore] = []
    prompts = Prompts(frame.to_frame(points, size))
    for chunk in prompts.chunks(prompts_at_once(sam.decoder, embedding.device)):
        logits, predicted = sam.decoder.decode(embedding, chunk, multimask=True)
        masks = frame.from_frame(logits, size) > 0
        for own, values in zip(masks.numpy(), predicted.numpy(), strict=True):
            index = len(scores)
            ious = [_iou(mask, components.ids == index) for mask in own]
            chosen = int(values.argmax())
            scores.append(
                MaskScore(
                    int(components.classes[index]), int(components.areas[index]), ious[chosen],
                    max(ious), float(values[chosen]),
                )
            )  # fmt: skip
    return scores


def _iou(mask: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    return float((mask & true).sum() / max(1, (mask | true).sum()))


def simulated_teacher(label: Bytes, seed: int, strength: float = 1.25) -> Bytes:
    """A label with the errors of a segmenter: smoothed outlines and wrong blobs.

    The indicators of the classes are blurred, and smooth noise is added to each before the largest
    is taken. Unlabeled pixels (255) get a class, too.

    Args:
        strength: of the noise.
    """
    rng = np.random.default_rng(seed)
    rows, columns = label.shape
    scale = rows / 128
    best: npt.NDArray[np.float32] = np.full(label.shape, -np.inf, np.float32)
    result = np.zeros_like(label)
    for number in np.setdiff1d(np.unique(label), [IGNORE]):
        own = cv2.GaussianBlur((label == number).astype(np.float32), (0, 0), 1.5 * scale)
        noise = rng.standard_normal((rows // 12 + 1, columns // 12 + 1)).astype(np.float32)
        own += strength * 0.3 * cv2.resize(noise, (columns, rows), interpolation=cv2.INTER_CUBIC)
        result[own > best] = number
        best = np.maximum(best, own)
    return result


def score_labels(
    sam: PointSam,
    scenes: Iterable[tuple[Bytes, Bytes]],
    options: SamOptions,
    seed: int,
    strength: float = 1.25,
) -> dict[str, float]:
    """mIoU in percent of the simulated teacher's labels and of the refined ones.

    Returns:
        teacher, refined: of all pixels; those in no refined mask keep the teacher's class.
        teacher_where_refined, refined_where_refined: of the pixels in a refined mask.
        covered: percentage of the pixels that are.
    """
    refiner = SamRefiner(sam.embed, sam.predict_masks, options)
    names = ("teacher", "refined", "teacher_where_refined", "refined_where_refined")
    matrices = {name: ConfusionMatrix(CITYSCAPES_19.num_classes, IGNORE) for name in names}
    covered = []
    for index, (image, label) in enumerate(scenes):
        teacher = torch.from_numpy(simulated_teacher(label, seed + index, strength))
        pseudo = PseudoLabel(teacher, torch.ones(teacher.shape))
        [refined] = refiner.refine([to_tensor(image)], [pseudo], [seed + index])
        inside = refined.covered
        merged = torch.where(inside, refined.class_map(), teacher)
        truth = torch.from_numpy(label)
        matrices["teacher"].update(teacher, truth)
        matrices["refined"].update(merged, truth)
        where = truth.masked_fill(~inside, IGNORE)
        matrices["teacher_where_refined"].update(teacher, where)
        matrices["refined_where_refined"].update(merged, where)
        covered.append(float(inside.float().mean()))
    scores = {name: 100 * matrix.mean_iou() for name, matrix in matrices.items()}
    return {**scores, "covered": 100 * float(np.mean(covered))}


def summary(scores: Sequence[MaskScore]) -> dict[str, Any]:
    """Mean IoUs of all components, by class and by size; numbers of components."""
    groups = {str(low): [] for low in AREAS}  # type: dict[str, list[float]]
    classes: dict[str, list[float]] = {}
    for score in scores:
        low = max((low for low in AREAS if score.area >= low), default=AREAS[0])
        groups[str(low)].append(score.chosen)
        classes.setdefault(CITYSCAPES_19.names[score.class_id], []).append(score.chosen)
    chosen, best, predicted = (
        [getattr(score, name) for score in scores] for name in ("chosen", "best", "predicted")
    )
    return {
        "components": len(scores),
        "mean_iou": _mean(chosen),
        "mean_iou_of_best": _mean(best),
        "error_of_predicted_iou": _mean(np.abs(np.subtract(chosen, predicted))),
        "by_area": {low: [len(v), _mean(v)] for low, v in groups.items() if v},
        "by_class": {name: [len(v), _mean(v)] for name, v in sorted(classes.items())},
    }


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4) if len(values) else float("nan")


def measured(args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """The part of the results that a record has."""
    kept = ("components", "mean_iou", "mean_iou_of_best", "labels")
    scores = {
        look: {name: value for name, value in own.items() if name in kept}
        for look, own in results.items()
    }
    return {"images": args.images, "seed": args.seed, "size": list(args.size), "scores": scores}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", default=str(STREET_SAM), help="of the SAM; '' for random ones")
    add("--model", default="street", help="MODEL.CLOUDS.SAM.MODEL (default: %(default)s)")
    add("--images", type=int, default=40, help="per look (default: %(default)s)")
    add("--seed", type=int, default=1000, help="of images and points (default: %(default)s)")
    add("--size", type=int, nargs=2, default=(160, 320), metavar=("H", "W"))
    add("--size-threshold", type=int, default=100, help="pixels (default: %(default)s)")
    add("--num-points", type=int, default=5, help="per component (default: %(default)s)")
    add("--strength", type=float, default=1.25, help="of the simulated teacher's noise")
    add("--held-out", action="store_true", help="random looks instead of the three")
    add("--output", type=Path, help="file for the scores, JSON")
    add("--record", metavar="COMMAND", help="write the record of the weights that COMMAND made")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images is {args.images}; at least 1 is needed")
    if args.record is not None and not Path(args.weights).is_file():
        parser.error(f"--record: --weights {args.weights!r} is no file whose record can be written")
    return args


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Scores by look; of all looks together under "all"."""
    cfg = config_of(args.model, args.weights, args.size_threshold)
    sam = build_point_sam(cfg, torch.device("cpu"))
    options = SamOptions(args.size_threshold, PointOptions(args.num_points))
    size = (args.size[0], args.size[1])
    results: dict[str, Any] = {}
    everything: list[MaskScore] = []
    for look in (HELD_OUT,) if args.held_out else LOOKS:
        scenes = list(tqdm(scenes_of(look, args.images, args.seed, size), total=args.images))
        scores = [
            score
            for index, (image, label) in enumerate(scenes)
            for score in score_masks(sam, image, label, options, args.seed + index)
        ]
        everything += scores
        results[look] = summary(scores)
        results[look]["labels"] = score_labels(sam, scenes, options, args.seed, args.strength)
    return {**results, "all": summary(everything)}


def show(results: dict[str, Any]) -> str:
    """The scores as text."""
    lines = []
    for look, scores in results.items():
        lines.append(
            f"{look}: {scores['components']} components, mean IoU {scores['mean_iou']:.3f} "
            f"(best of three {scores['mean_iou_of_best']:.3f}, predicted IoU off by "
            f"{scores['error_of_predicted_iou']:.3f})"
        )
        for low, (count, value) in scores["by_area"].items():
            lines.append(f"    from {low:>6} pixels: {value:.3f} ({count})")
        parts = [f"{n} {value:.2f} ({count})" for n, (count, value) in scores["by_class"].items()]
        lines.append("    " + ", ".join(parts))
        if "labels" in scores:
            parts = [f"{name} {value:.1f}" for name, value in scores["labels"].items()]
            lines.append("    labels, mIoU: " + ", ".join(parts))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores; returns the exit code."""
    args = parse(argv)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    weights = Path(args.weights)
    with (
        user_errors_in_one_line(),
        nullcontext() if args.record is None else without_record(weights),
    ):
        results = evaluate(args)
        print(show(results))
        if args.record is not None:
            write_record(weights, args.record, measured(args, results))
        if args.output:
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
