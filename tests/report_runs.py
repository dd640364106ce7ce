"""Folders of runs for tests of reports, and the parts of their pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from torch import nn

from clouds.config import get_cfg
from clouds.data.label_space import CITYSCAPES_19
from clouds.environment import dump_config
from clouds.evaluation import ConfusionMatrix, DatasetResult, Results
from clouds.evaluation.image_scores import ImageScore
from clouds.evaluation.pseudo_labels import SCORED, PseudoLabelResult
from clouds.evaluation.report import describe_run, write_results

# (label, prediction): pixels. IoU: road 60/80, vegetation 30/40, bus 10/20, terrain 0/20
COUNTS = {(0, 0): 60, (9, 0): 20, (15, 15): 10, (15, 8): 10, (8, 8): 30}
BETTER = {(0, 0): 60, (9, 9): 20, (15, 15): 15, (15, 8): 5, (8, 8): 30}
LOSSES = (8.0, 4.0, 2.0)
PERIOD = 5


def result_of(name, counts, scores=None):
    """Result of a dataset; `scores`: mIoU by file."""
    matrix = ConfusionMatrix(19)
    for (label, prediction), pixels in counts.items():
        matrix.counts[label, prediction] = pixels
    images = [ImageScore(file, miou, 50.0) for file, miou in (scores or {}).items()]
    return DatasetResult.from_confusion(
        name, CITYSCAPES_19, matrix, range(19), images=3, seconds=6.0, image_scores=images
    )


def write_run(
    folder, datasets, *, scores=None, losses=LOSSES, pseudo_labels=False, iteration=14, **settings
):
    """Write a run of 15 iterations with a record every 5.

    Args:
        datasets: counts by name; None: it was interrupted before its first evaluation.
        scores: mIoU of images by file, of each dataset.
        losses: of the records.
        iteration: of results.json; None: an evaluation without training.
        settings: of the config, `__` for the dot.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 15, "MODEL.DEVICE", "cpu"])
    for name, value in settings.items():
        cfg.merge_from_list([name.replace("__", "."), value])
    if iteration is not None:
        dump_config(cfg, folder / "config.yaml", "clouds train --config-file x")
        write_records(folder, losses)
    if datasets is not None:
        by_class = {"teacher": {"road": 30.0}}
        labels = [PseudoLabelResult("sd_x", dict.fromkeys(SCORED, 40.0), 90.0, 3, by_class)]
        results = Results(
            "native",
            tuple(result_of(name, counts, scores) for name, counts in datasets.items()),
            tuple(labels) if pseudo_labels else (),
        )
        write_results(results, describe_run(cfg, nn.Linear(2, 2), iteration=iteration), folder)
        if iteration is not None:
            flat = {k: v if v == v else None for k, v in results.flat().items()}
            line = {"iteration": iteration, "evaluation": True, **flat}
            with (folder / "metrics.json").open("a") as file:
                file.write(json.dumps(line) + "\n")
    return folder


def write_records(folder, losses):
    """Training records, a second per iteration, a quarter of it waiting."""
    with (Path(folder) / "metrics.json").open("w") as file:
        for i, loss in enumerate(losses):
            record = {"iteration": PERIOD * (i + 1) - 1, "total_loss": loss, "loss_ce": 1.0}
            record |= {"loss_ce_0": 1.0, "grad_norm": 3.0, "lr": 0.1 / (i + 1)}
            record |= {"seconds": 1.0, "data_seconds": 0.25, "images_per_second": 4.0}
            file.write(json.dumps({**record, "memory_gib": 1.5}) + "\n")


class Page(HTMLParser):
    """A page: all tags, the text of tables by the section that they are in, the title.

    Attributes:
        tags: (name, attributes) of each.
        tables: id of the section -> tables, each a list of rows of cells.
        texts: text of the elements by tag name.
    """

    VOID = ("meta", "img", "input", "br", "wbr", "link")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.tables, self.texts = [], [], {}, {}
        self.section = ""
        self.in_cell = False
        self.feed(text)
        self.close()
        assert self.open == []  # every element is closed

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = attributes["id"]
        elif tag == "table":
            self.tables.setdefault(self.section, []).append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.tables[self.section][-1][-1][-1] += data
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def rows(self, section, number=0):
        """Title of each row of a table -> its cells."""
        return {row[0]: row[1:] for row in self.tables[section][number]}
