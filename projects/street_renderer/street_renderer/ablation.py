"""The trainings of the demo and its tables, by `clouds.ablation`.

The first rows are the paper's ablation: joint training against training on the source alone for as
many iterations, from the same weights of source pre-training.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clouds.ablation.local import LocalRunner
from clouds.ablation.plan import FINAL, Run
from clouds.ablation.runs import check_unchanged, results_of, unfinished
from clouds.ablation.scores import MetricSpecs
from clouds.ablation.table import Row, Table
from clouds.config import load_config
from clouds.engine.run_folder import prepare
from clouds.files import atomic_write

WARMUP, JOINT = "demo/warmup", "demo/joint"
FROZEN, SOURCE = "frozen CLIP", "source alone"

THREADS = 1
"""Threads of a run. Another number changes the order of sums, and a seed's score by up to two
points of mIoU."""


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        folder: name of its folder.
        config: name of its config.
        overrides: KEY, VALUE, … that change it.
        start: name of the row whose final weights it starts from, with the same seed; empty: what
            the config says.
    """

    folder: str
    config: str
    overrides: tuple[str, ...] = ()
    start: str = ""


ROWS: Mapping[str, Setting] = {
    FROZEN: Setting("warmup", WARMUP),
    SOURCE: Setting("source", JOINT, ("DATASETS.TRAIN", "('gta5',)"), FROZEN),
    "generated": Setting("generated", JOINT, ("MODEL.CLOUDS.REFINER", "none"), FROZEN),
    "joint": Setting("joint", JOINT, (), FROZEN),
}
"""What `make demo` trains."""

SHORT: Mapping[str, tuple[str, ...]] = {
    WARMUP: ("SOLVER.MAX_ITER", "450", "SOLVER.CHECKPOINT_PERIOD", "450"),
    JOINT: ("SOLVER.MAX_ITER", "225", "SOLVER.CHECKPOINT_PERIOD", "225"),
}
"""Overrides of `make demo`, by config: half of the iterations of the table."""

LONGEST = ("trained random", "joint", "joint, classes by CLIP")
"""Rows whose runs take longest; they start before the others that could start at the same time."""

TITLES: Mapping[str, str] = {
    FROZEN: "source pre-training, frozen CLIP",
    SOURCE: "+ as many iterations on the source alone",
    "generated": "+ generated images, labels of the teacher",
    "joint": "+ generated images, labels refined by SAM",
}

CLASSES_BY_CLIP = (
    *("MODEL.CLOUDS.CROP_CLASSES.WEIGHT", "0.5"),
    *("MODEL.CLOUDS.SAM.RM_INTERSECTION", "False"),
)
"""Pixels in masks of several classes stay in one of them, whose region then gets its class anew."""
LONGER = ("SOLVER.MAX_ITER", "900", "SOLVER.BASE_LR", "2e-3", "SOLVER.CHECKPOINT_PERIOD", "900")
"""After source pre-training, twice as long as the other rows, with twice their learning rate."""
RELIT = "relit"
"""Folder of images of the source's scenes in another look, with labels."""
ENSEMBLE = (
    *("SOLVER.MAX_ITER", "0"),
    *("MODEL.CLOUDS.GEOMETRIC_ENSEMBLE", "True", "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE_ALPHA", "0.15"),
)
"""Evaluates with CLIP's zero-shot classes, without training."""

FURTHER_ROWS: Mapping[str, Setting] = {
    "trained random": Setting(
        "random",
        WARMUP,
        ("MODEL.CLOUDS.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.BACKBONE.FREEZE", "False"),
    ),
    "frozen CLIP, ensemble": Setting("ensemble", WARMUP, ENSEMBLE, FROZEN),
    "frozen CLIP, text head": Setting(
        "text", WARMUP, ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "text")
    ),
    "joint, classes by CLIP": Setting("joint_clip", JOINT, CLASSES_BY_CLIP, FROZEN),
    "source alone, 900 iterations": Setting(
        "source_900", JOINT, ("DATASETS.TRAIN", "('gta5',)", *LONGER), FROZEN
    ),
    "given labels, 900 iterations": Setting(
        "given_900",
        JOINT,
        (
            *("DATASETS.TRAIN", f"('gta5', 'sd_{RELIT}')"),
            *("MODEL.CLOUDS.GENERATED_LABELS", "given"),
            *("DATASETS.TARGET_FACTOR", "1.667"),  # half of the images
            *LONGER,
        ),
        FROZEN,
    ),
}
"""What `--full` trains besides: another backbone, an ensemble with zero-shot classes, queries
compared with CLIP's text features, CLIP's classes of refined regions, the labels of the renderer
for the source's own scenes in another look."""

LABELS = ("teacher", "refined", "student")
"""Label maps of generated images that are scored."""

METRICS: MetricSpecs = {
    "mIoU": ("mean/mIoU",),
    "pixel accuracy": ("*/pixel-accuracy",),
    **{f"labels: {name}": (f"sd_*/{name}-mIoU",) for name in LABELS},
}
"""Columns: means over the unseen domains, and mIoU of labels of the generated images."""


def plan(
    rows: Mapping[str, Setting],
    seeds: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    full: bool = True,
) -> list[Run]:
    """The runs of all rows and seeds.

    Args:
        output: folder of the runs' folders.
        overrides: KEY, VALUE, … of all runs.
        full: the runs of the table, in folders with the seed in their name; False: those of
            `make demo`, which are shorter (`SHORT`), of one seed.

    Raises:
        ConfigError: a config is invalid.
    """

    def folder(name: str, seed: int) -> Path:
        return output / (f"{rows[name].folder}_{seed}" if full else rows[name].folder)

    runs = []
    for seed in seeds:
        for name, row in rows.items():
            words = (*row.overrides, *(() if full else SHORT[row.config]), *overrides)
            own = ["SEED", str(seed), "OUTPUT_DIR", str(folder(name, seed))]
            if row.start:
                own += ["MODEL.WEIGHTS", str(folder(row.start, seed) / FINAL)]
            cfg = load_config(row.config, [*words, *own])
            runs.append(Run(name, seed, row.config, words, row.start, cfg))
    return runs


def train(
    runs: Sequence[Run],
    processes: int,
    environment: Mapping[str, str],
    afresh: bool = False,
) -> str:
    """Train what has not ended, `processes` runs at a time, each on `THREADS` threads.

    Args:
        environment: environment variables of the runs, besides those of this process.
        afresh: set earlier runs in the folders aside; False: go on where they stopped.

    Returns:
        Why a run failed or all were stopped; empty: all have ended.

    Raises:
        ValueError: without `afresh`, a folder has a run of another config.
    """
    if afresh:
        for run in runs:
            prepare(run.folder, resume=False, overwrite=True)
    check_unchanged(runs)
    slot = {**environment, "OMP_NUM_THREADS": str(THREADS)}
    runner = LocalRunner([slot] * processes)
    ordered = sorted(unfinished(runs), key=lambda run: run.setting not in LONGEST)
    for run, outcome in runner.run(ordered).items():
        return f"{run.name}: {outcome}. Its log is in {run.folder}"
    return "stopped; with --full the same command goes on" if runner.stopped_by else ""


def table_of(rows: Mapping[str, Setting], runs: Sequence[Run]) -> Table:
    """The table of runs that have ended, rows in the order of `rows`."""
    found = {name: {r.seed: results_of(r) for r in runs if r.setting == name} for name in rows}
    table_rows = [
        Row(name, {seed: one for seed, one in by_seed.items() if one is not None}, len(by_seed))
        for name, by_seed in found.items()
    ]
    return Table(tuple(table_rows), METRICS, SOURCE)


def record(table: Table, command: str, processes: int) -> dict[str, Any]:
    """Every score of a table as JSON values, with what they depend on."""
    some = next(iter(table.rows[0].results.values()))
    columns = {
        metric: {row.name: _rounded(row.values(names)) for row in table.rows if row.values(names)}
        for metric, names in METRICS.items()
    }
    return {
        "unit": "percent",
        "command": command,
        "threads": THREADS,
        "processes": processes,
        "machine": machine(),
        "versions": some.content["versions"],
        "rows": columns.pop("mIoU"),
        **columns,
    }


def _rounded(scores: Mapping[int, float]) -> dict[str, float]:
    return {str(seed): round(score, 2) for seed, score in scores.items()}


def machine() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(table: Table, content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write street_world.json and street_world.md, each file atomically; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "street_world.json": json.dumps(content, indent=2) + "\n",
        "street_world.md": table.markdown() + "\n",
    }
    for name, text in texts.items():
        with atomic_write(folder / name, "w") as file:
            file.write(text)
    return [folder / name for name in texts]
