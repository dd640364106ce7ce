"""Score two predictors that know nothing of shapes on the datasets of a config.

    python tools/trivial_baselines.py --config-file configs/demo/warmup.yaml

`constant map`: at every place the class that is most frequent there in the training labels, the
same map for every image. `colour and row`: a gradient-boosted classifier (scikit-learn) of a
pixel's RGB and row, fitted on random pixels of the training images. A network that learned to see
is well above both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from command_line import refuse_late_flags, user_errors_in_one_line

with user_errors_in_one_line():
    import cv2
    import numpy as np
    import numpy.typing as npt
    from tabulate import tabulate
    from tqdm import tqdm

    from clouds.data.datasets import DatasetSpec, get_dataset, is_generated
    from clouds.data.label_space import CITYSCAPES_19, IGNORE
    from clouds.data.reading import read_image

# torch is imported where it is used: --help and a mistyped flag answer at once.

UInt8Array = npt.NDArray[np.uint8]
Predictor = Callable[[UInt8Array], UInt8Array]
"""Image (H, W, 3) RGB -> class map (H, W)."""


def constant_map(sources: Sequence[DatasetSpec], side: int = 128) -> Predictor:
    """Most frequent class at each place, counted on labels shrunk to `side` x `side`."""
    counts = np.zeros((CITYSCAPES_19.num_classes, side, side), np.int64)
    for spec in sources:
        for record in tqdm(spec.records(), desc=f"constant map: {spec.name}"):
            label = cv2.resize(
                spec.read_label(record), (side, side), interpolation=cv2.INTER_NEAREST
            )
            for c in np.unique(label[label != IGNORE]):
                counts[c] += label == c
    best = counts.argmax(0).astype(np.uint8)

    def predict(image: UInt8Array) -> UInt8Array:
        height, width = image.shape[:2]
        return cv2.resize(best, (width, height), interpolation=cv2.INTER_NEAREST)

    return predict


def colour_and_row(sources: Sequence[DatasetSpec], pixels: int, seed: int) -> Predictor:
    """A classifier of RGB and relative row, fitted on `pixels` random labelled pixels.

    It is asked once for each of 2^20 cells of colour and row (five bits each), whose answers are
    then looked up.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    rng = np.random.default_rng(seed)
    records = [(spec, record) for spec in sources for record in spec.records()]
    share = max(1, pixels // len(records))
    inputs, classes = [], []
    for spec, record in tqdm(records, desc="colour and row"):
        label = spec.read_label(record).ravel()
        chosen = rng.choice(np.flatnonzero(label != IGNORE), share)
        inputs.append(cells(read_image(record.image)).ravel()[chosen])
        classes.append(label[chosen])
    model = HistGradientBoostingClassifier(random_state=seed)
    model.fit(features(np.concatenate(inputs)), np.concatenate(classes))
    answers = model.predict(features(np.arange(1 << 20))).astype(np.uint8)
    return lambda image: answers[cells(image)]


def cells(image: UInt8Array) -> npt.NDArray[np.int64]:
    """(H, W, 3) -> (H, W): number of the cell of red, green, blue and row, 0 to 2^20 - 1."""
    red, green, blue = np.moveaxis(image.astype(np.int64) >> 3, -1, 0)
    row = np.arange(len(image))[:, None] * 32 // len(image)
    return ((red * 32 + green) * 32 + blue) * 32 + row


def features(cell: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(N,) -> (N, 4): red, green, blue, row, 0 to 31 each."""
    return np.stack([cell >> 15, cell >> 10 & 31, cell >> 5 & 31, cell & 31], axis=-1)


def score(predict: Predictor, spec: DatasetSpec) -> float:
    """mIoU in percent over the classes of the dataset."""
    import torch

    from clouds.evaluation.confusion import ConfusionMatrix

    matrix = ConfusionMatrix(CITYSCAPES_19.num_classes)
    for record in tqdm(spec.records(), desc=spec.name):
        prediction = predict(read_image(record.image))
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(spec.read_label(record)))
    return 100 * matrix.mean_iou(spec.classes_present)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--pixels", type=int, default=200_000, help="pixels to fit on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    args = parser.parse_args()
    refuse_late_flags(parser, args.opts)
    with user_errors_in_one_line():
        print(table(args))


def table(args: argparse.Namespace) -> str:
    """Fit both, score them on all test datasets."""
    from clouds.config import load_config

    cfg = load_config(args.config_file, args.opts)
    labelled = [name for name in cfg.DATASETS.TRAIN if not is_generated(name)]
    sources = [get_dataset(name) for name in labelled]
    targets = [get_dataset(name) for name in cfg.DATASETS.TEST]
    predictors = {
        "constant map": constant_map(sources),
        "colour and row": colour_and_row(sources, args.pixels, args.seed),
    }
    rows = []
    for name, predict in predictors.items():
        scores = [score(predict, spec) for spec in targets]
        rows.append([name, *scores, float(np.mean(scores))])
    headers = ["mIoU, %", *cfg.DATASETS.TEST, "mean"]
    return tabulate(rows, headers, floatfmt=".1f", tablefmt="github")


if __name__ == "__main__":
    main()
