"""The model card: README.md with the header that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from tabulate import tabulate

from clouds.config.values import flatten
from clouds.d2 import CfgNode
from clouds.data.label_space import LabelSpace
from clouds.export.graphs import CHECKED_SIZES, Check
from clouds.export.network import MIN_SIDE
from clouds.inference.exported import LIBRARY, WEIGHTS_FILE
from clouds.version import __version__
from clouds.yaml_core import CoreLoader

TASK = "image-segmentation"

SIZE_KEYS = ("TEST.SHORT_SIDE", "TEST.LONG_SIDE_MAX", "TEST.INPUT_SIZES", "TEST.SLIDE", "TEST.AUG")
"""Keys and sections of an evaluation that change its scores."""

NO_LICENCE = (
    "Not stated. It depends on the licences of the training data and of the backbone's weights; "
    "state it before the model is published."
)


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        name: of the model.
        cfg: its config.
        label_space: its classes.
        licence: identifier such as `apache-2.0`; empty: not stated.
        results: contents of the results.json files of exactly these weights.
        iteration: the last one of training, from 0; None: not known.
        selection: how the weights were chosen among those of the run; empty: not at all.
        merged: number of low-rank updates that were merged into the weights.
        input_type: of the graphs' images.
        checks: name of each graph's file -> how it differs from the model.
        has_weights: WEIGHTS_FILE is in the folder.
    """

    name: str
    cfg: CfgNode
    label_space: LabelSpace
    licence: str
    results: Sequence[Mapping[str, Any]]
    iteration: int | None
    selection: str
    merged: int
    input_type: str
    checks: Mapping[str, Check]
    has_weights: bool

    def text(self) -> str:
        """The whole file."""
        parts = [
            f"---\n{yaml.safe_dump(self.header(), sort_keys=False, allow_unicode=True)}---",
            f"# {self.name}",
            "Semantic segmentation that generalizes to other domains than the training data: a "
            f"Mask2Former head on a foundation model, trained with CLOUDS {__version__}.",
            "## Model",
            self.facts(),
            "## Classes",
            self.classes(),
            "## Scores",
            self.scores(),
            "## Use",
            *self.uses(),
            "## Licence",
            self.licence or NO_LICENCE,
        ]
        return "\n\n".join(parts) + "\n"

    def header(self) -> dict[str, Any]:
        """The header's entries, as the hub names them."""
        header: dict[str, Any] = {"library_name": LIBRARY, "pipeline_tag": TASK}
        header["tags"] = ["semantic-segmentation", "domain-generalization"]
        header["tags"] += [tag for tag in ("onnx",) if "model.onnx" in self.checks]
        if self.licence:
            header["license"] = self.licence
        results = [
            {
                "task": {"type": TASK},
                "dataset": {"type": name, "name": name},
                "metrics": [
                    {"type": "mean_iou", "name": f"mIoU ({one['protocol']})", "value": row["mIoU"]}
                ],
            }
            for one in self.results
            for name, row in one["datasets"].items()
            if row["mIoU"] is not None
        ]
        if results:
            header["model-index"] = [{"name": self.name, "results": results}]
        return header

    def facts(self) -> str:
        """A table of what the model is and was trained on."""
        model, solver = self.cfg.MODEL, self.cfg.SOLVER
        encoder = model.CLOUDS.CLIP_MODEL_NAME
        if model.BACKBONE.NAME == "ViT":
            encoder = model.BACKBONE.TIMM_NAME
        adapter = model.BACKBONE.ADAPTER.NAME
        if self.merged:
            adapter = f"low-rank, merged into {self.merged} weights"
        done = "not known" if self.iteration is None else self.iteration + 1
        rows = {
            "backbone": f"{model.BACKBONE.NAME}, {encoder}",
            "adapter": adapter,
            "class head": model.MASK_FORMER.TRANSFORMER_DECODER_NAME,
            "training data": ", ".join(self.cfg.DATASETS.TRAIN),
            "iterations": f"{done} of {solver.MAX_ITER}, {solver.IMS_PER_BATCH} images each",
            "seed": self.cfg.SEED,
        }
        return tabulate([*rows.items()], ["", ""], "github", disable_numparse=True)

    def classes(self) -> str:
        """A table of ids, names and colors."""
        rows = [
            (i, name, "#{:02x}{:02x}{:02x}".format(*color))
            for i, (name, color) in enumerate(
                zip(self.label_space.names, self.label_space.colors, strict=True)
            )
        ]
        return tabulate(rows, ["id", "class", "color"], "github")

    def scores(self) -> str:
        """A table of mIoU by dataset and settings, and how the weights were chosen."""
        notes = [self.selection] if self.selection else []
        if not self.results:
            return "\n\n".join([*notes, "There is no results.json of exactly these weights."])
        rows = [
            (
                name,
                one["protocol"],
                self._other_settings(one) or "–",
                "–" if row["mIoU"] is None else f"{row['mIoU']:.2f}",
                row["images"],
            )
            for one in self.results
            for name, row in one["datasets"].items()
        ]
        header = ["dataset", "protocol", "other settings than config.json", "mIoU, %", "images"]
        table = tabulate(rows, header, "github")
        return "\n\n".join([table, *notes])

    def _other_settings(self, results: Mapping[str, Any]) -> str:
        """Sizes and augmentations of an evaluation that differ from the config: `KEY value, …`."""
        evaluated = dict(flatten((results.get("config") or {}).get("TEST", {}), "TEST."))
        present = dict(flatten(yaml.load(self.cfg.TEST.dump(), CoreLoader), "TEST."))
        return ", ".join(
            f"{key} {value}"
            for key, value in evaluated.items()
            if key.startswith(SIZE_KEYS) and value != present.get(key)
        )

    def uses(self) -> list[str]:
        """How the files of the folder are loaded."""
        test = self.cfg.TEST
        parts = []
        if self.has_weights:
            parts.append(
                f"`{WEIGHTS_FILE}` and `config.json`, with this project; images of any size are "
                f"resized as in evaluation:\n\n{_python(LOAD)}"
            )
        if self.checks:
            parts.append(
                f"Graphs take RGB images (N, 3, H, W) of the type {self.input_type}, 0 to 255, of "
                f"any batch size, height and width from {MIN_SIDE} pixels, and give scores "
                f"(N, {self.label_space.num_classes}, H, W) in float32; the class is their argmax. "
                "Normalization and padding are inside, resizing is not: the config has a short "
                f"side of {test.SHORT_SIDE or 'the image itself'} (TEST.SHORT_SIDE, TEST.PROTOCOL "
                f"{test.PROTOCOL})."
            )
        snippets = {"model.onnx": ONNX, "model.pt2": TORCH}
        parts += [
            f"`{file}`:\n\n{_python(snippets[file].replace('INPUT_TYPE', self.input_type))}"
            for file in self.checks
        ]
        rows = [
            (file, f"{one.difference:.1e}", f"{one.agreement:.4%}")
            for file, one in self.checks.items()
        ]
        if rows:
            header = ["file", "largest difference of scores", "pixels with the same class"]
            sizes = " and ".join(str(size) for size in CHECKED_SIZES)
            table = tabulate(rows, header, "github", disable_numparse=True)
            parts.append(f"Compared with the model on random images of {sizes}:\n\n{table}")
        return parts


LOAD = """
import clouds

segmenter = clouds.load("FOLDER")
segmenter("street.jpg").overlay().show()
"""

ONNX = """
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
image = np.asarray(Image.open("street.jpg").convert("RGB"))  # (H, W, 3)
images = image.transpose(2, 0, 1)[None].astype(np.INPUT_TYPE)
(scores,) = session.run(None, {"images": images})
labels = scores[0].argmax(0)  # (H, W)
"""

TORCH = """
import numpy as np
import torch
from PIL import Image

network = torch.export.load("FOLDER/model.pt2").module()
image = np.array(Image.open("street.jpg").convert("RGB"))  # (H, W, 3)
images = torch.from_numpy(image).permute(2, 0, 1)[None].to(torch.INPUT_TYPE)
labels = network(images)[0].argmax(0)  # (H, W)
"""


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"
