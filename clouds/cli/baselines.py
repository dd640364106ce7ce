"""Evaluate two baselines without a neural network on the test datasets of a config.

`constant map`: for each pixel position the most frequent class in the training labels, the same
class map for every image. `color and row`: a gradient-boosted classifier (scikit-learn) of the RGB
values and the row of a pixel, fitted on random pixels of the training images. A trained network
should score well above both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from clouds.cli.command_line import (
    add_overrides,
    given_overrides,
    new_parser,
    user_errors_in_one_line,
)
from clouds.messages import install_extra

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from clouds.data.datasets import DatasetSpec

UInt8Array: TypeAlias = "npt.NDArray[np.uint8]"
Predictor: TypeAlias = "Callable[[UInt8Array], UInt8Array]"
"""Image (H, W, 3) RGB -> class map (H, W)."""


def constant_map(sources: Sequence[DatasetSpec], side: int = 128) -> Predictor:
    """The most frequent class at each position, counted on labels resized to `side` x `side`."""
    import cv2
    import numpy as np
    from tqdm import tqdm

    label_space = sources[0].label_space
    counts = np.zeros((label_space.num_classes, side, side), np.int64)
    for spec in sources:
        for record in tqdm(spec.records(), desc=f"constant map: {spec.name}"):
            label = cv2.resize(
                spec.read_label(record), (side, side), interpolation=cv2.INTER_NEAREST
            )
            for c in np.unique(label[label != label_space.ignore]):
                counts[c] += label == c
    class_map = counts.argmax(0).astype(np.uint8)

    def predict(image: UInt8Array) -> UInt8Array:
        height, width = image.shape[:2]
        resized: UInt8Array = cv2.resize(
            class_map, (width, height), interpolation=cv2.INTER_NEAREST
        )
        return resized

    return predict


def color_and_row(sources: Sequence[DatasetSpec], pixels: int, seed: int) -> Predictor:
    """A classifier of RGB and relative row, fitted on `pixels` random labelled pixels.

    Inputs are quantized to five bits each. The classifier predicts all 2^20 combinations once, as a
    table.
    """
    import numpy as np
    from tqdm import tqdm

    from clouds.data.reading import read_image

    classifier = import_classifier()
    rng = np.random.default_rng(seed)
    records = [(spec, record) for spec in sources for record in spec.records()]
    pixels_per_image = max(1, pixels // len(records))
    inputs, classes = [], []
    for spec, record in tqdm(records, desc="color and row"):
        label = spec.read_label(record).ravel()
        labeled = np.flatnonzero(label != spec.label_space.ignore)
        sampled = rng.choice(labeled, pixels_per_image)
        inputs.append(quantize(read_image(record.image)).ravel()[sampled])
        classes.append(label[sampled])
    model = classifier(random_state=seed)
    model.fit(features(np.concatenate(inputs)), np.concatenate(classes))
    predictions = model.predict(features(np.arange(1 << 20))).astype(np.uint8)
    return lambda image: predictions[quantize(image)]


def import_classifier() -> Any:
    """The class of scikit-learn's classifier.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the baseline 'color and row' needs scikit-learn: {install_extra('baselines')}"
        ) from error
    return HistGradientBoostingClassifier


def quantize(image: UInt8Array) -> npt.NDArray[np.int64]:
    """(H, W, 3) -> (H, W): red, green, blue and row with five bits each, 0 to 2^20 - 1."""
    import numpy as np

    red, green, blue = np.moveaxis(image.astype(np.int64) >> 3, -1, 0)
    row = np.arange(len(image))[:, None] * 32 // len(image)
    codes: npt.NDArray[np.int64] = ((red * 32 + green) * 32 + blue) * 32 + row
    return codes


def features(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(N,) values of `quantize` -> (N, 4): red, green, blue, row, 0 to 31 each."""
    import numpy as np

    return np.stack([codes >> 15, codes >> 10 & 31, codes >> 5 & 31, codes & 31], axis=-1)


def score(predict: Predictor, spec: DatasetSpec) -> float:
    """mIoU in percent over the classes in the dataset's label set."""
    import torch
    from tqdm import tqdm

    from clouds.data.dataset_mapper import read_record_image
    from clouds.evaluation.confusion import ConfusionMatrix

    matrix = ConfusionMatrix(spec.label_space.num_classes, spec.label_space.ignore)
    for record in tqdm(spec.records(), desc=spec.name):
        prediction = predict(read_record_image(record))
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(spec.read_label(record)))
    return 100 * matrix.mean_iou(spec.classes_present)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser("baselines", __doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--pixels", type=int, default=200_000, metavar="N",
        help="pixels to fit on (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_overrides(parser, "DATASETS.TEST \"('bdd_val',)\"")
    args = parser.parse_args(argv)
    args.opts = given_overrides(parser, args.opts)
    if args.pixels < 1:
        parser.error(f"--pixels is {args.pixels}; it must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and evaluate both baselines, and print the table."""
    args = parse(argv)
    with user_errors_in_one_line():
        print(table(args))


def table(args: argparse.Namespace) -> str:
    """Fit both baselines, score them on all test datasets."""
    import numpy as np
    from tabulate import tabulate

    from clouds.config import load_config
    from clouds.data.datasets import Datasets

    import_classifier()  # an error before the first baseline is computed
    cfg = load_config(args.config_file, args.opts)
    datasets = Datasets.from_config(cfg)
    sources = [datasets.get(name) for name in datasets.labelled]
    targets = [datasets.get(name) for name in cfg.DATASETS.TEST]
    predictors = {
        "constant map": constant_map(sources),
        "color and row": color_and_row(sources, args.pixels, args.seed),
    }
    rows = []
    for name, predict in predictors.items():
        scores = [score(predict, spec) for spec in targets]
        rows.append([name, *scores, float(np.mean(scores))])
    headers = ["mIoU, %", *cfg.DATASETS.TEST, "mean"]
    return tabulate(rows, headers, floatfmt=".1f", tablefmt="github")
