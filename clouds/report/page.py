"""The page of a report: its sections, and the HTML file."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from clouds.data.reading import read_image
from clouds.evaluation.report import VISUALIZATIONS
from clouds.evaluation.results_file import number
from clouds.files import atomic_write, expand_user
from clouds.messages import format_examples, install_extra
from clouds.report.confusion import Matrix, normalized
from clouds.report.embed import PANEL_WIDTH, Embedder
from clouds.report.figures import color_of, figures
from clouds.report.run import Run, read_runs
from clouds.report.samples import Sample, choose, predict
from clouds.report.tables import (
    MISSING,
    Table,
    anomaly_table,
    class_table,
    config_table,
    corruption_table,
    dataset_names,
    environment_table,
    pseudo_label_table,
    score_table,
    shared_datasets,
    time_table,
)
from clouds.version import __version__
from clouds.visualizer import LegendEntry, legend_of, present_ids

logger = logging.getLogger(__name__)

FILE = "report.html"
"""Name of a report in the folder of its first run."""

IMAGES = 2
"""Default of the images of each kind (best, worst, …) of each dataset."""


@dataclass(frozen=True)
class Tile:
    """An image of the page: its caption, and its data URI."""

    caption: str
    uri: str


@dataclass(frozen=True)
class SampleView:
    """A chosen image: what it is, and image, label and predictions."""

    title: str
    reasons: tuple[str, ...]
    tiles: tuple[Tile, ...]


@dataclass
class DatasetSection:
    """What the page tells about a dataset."""

    name: str
    table: Table
    matrices: list[Matrix]
    samples: list[SampleView] = field(default_factory=list)
    legend: list[LegendEntry] = field(default_factory=list)
    panels: list[Tile] = field(default_factory=list)


def write_report(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    images: int = IMAGES,
    device: str | None = None,
) -> Path:
    """Write one HTML file, which needs no other file and no network, about one or several runs.

    Numbers are those of the runs' results.json and metrics.json. Differences are to the first run.

    Args:
        runs: folders: OUTPUT_DIR of trainings, or those that evaluations write.
        output: the file; None: report.html in the folder of the first run.
        images: best and worst images of each dataset, which are predicted again with the runs'
            checkpoints; 0: none, and no checkpoint is read.
        device: of the predictions, see `clouds.load`.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError, ValueError: a folder holds no run, or a file of it is damaged.
        ImportError: plotly is not installed.
        OSError: the file cannot be written.
    """
    script = plotly_script()
    read = read_runs([expand_user(folder) for folder in runs])
    path = read[0].folder / FILE if output is None else expand_user(output)
    html = render(read, script, images=images, device=device)
    with atomic_write(path) as file:
        file.write(html.encode("utf-8", "backslashreplace"))  # names that are not UTF-8
    return path


def plotly_script() -> str:
    """The JavaScript of plotly, megabytes.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # an extra, and slow
    except ImportError as error:
        raise ImportError(f"a report needs plotly: {install_extra('report')}") from error
    script: str = get_plotlyjs()
    return script


def render(runs: Sequence[Run], script: str, *, images: int, device: str | None) -> str:
    """The page as HTML; `script` is the JavaScript of plotly."""
    embedder = Embedder()
    notes = comparison_notes(runs)
    names = dataset_names(runs)
    chosen = {name: choose(runs, name, images) for name in names}
    samples, problems = predict(runs, chosen, device)
    pseudo = pseudo_label_table(runs)
    sections = [_section(runs, name, samples, embedder) for name in names]
    pseudo_panels = [
        tile for run in runs for name in run.pseudo_labels for tile in _panels(run, name, embedder)
    ]
    if embedder.left_out:
        notes.append(
            f"{embedder.left_out} images are left out, since the others have "
            f"{embedder.max_bytes >> 20} MiB. Fewer images of each kind: --images 1."
        )
    environment = Environment(
        loader=PackageLoader("clouds.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["color_of"] = color_of
    environment.filters["breakable"] = breakable
    return environment.get_template("report.html").render(
        title=" · ".join(run.name for run in runs),
        runs=runs,
        notes=notes,
        problems=problems,
        scores=score_table(runs),
        corruptions=corruption_table(runs),
        anomalies=anomaly_table(runs),
        figures=figures(runs),
        sections=sections,
        pseudo_labels=pseudo if pseudo.rows else None,
        pseudo_panels=pseudo_panels,
        times=time_table(runs),
        config=config_table(runs),
        provenance=environment_table(runs),
        version=__version__,
        date=datetime.now().isoformat(" ", "minutes"),
        plotly=Markup(script),
    )


def breakable(text: str) -> Markup:
    """Text as HTML in which a line may break after the dots, slashes and underscores of names."""
    return Markup(re.sub(r"([._/])(?=\w)", r"\1<wbr>", str(escape(text))))


def comparison_notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing: incomplete runs, other data, other protocols."""
    notes = [f"{run.name} is {run.status()}." for run in runs if not run.is_complete]
    evaluated = [run for run in runs if run.results]
    protocols = dict.fromkeys(str(run.results.get("protocol")) for run in evaluated)
    if len(protocols) > 1:
        notes.append(
            f"The protocols differ ({', '.join(protocols)}), so the scores do not compare."
        )
    names, shared = dataset_names(runs), shared_datasets(runs)
    for run in evaluated:
        others = [name for name in names if name in run.datasets and name not in shared]
        if others:
            notes.append(f"Only some runs are evaluated on {', '.join(others)}: {run.name} is.")
    if len(evaluated) > 1 and names and not shared:
        notes.append("The runs share no dataset, so there is nothing to compare.")
    for name in shared:
        counts = dict.fromkeys(str(run.datasets[name].get("images")) for run in evaluated)
        if len(counts) > 1:
            notes.append(f"{name} has different numbers of images: {', '.join(counts)}.")
    for run in runs:
        if run.results.get("selection"):
            notes.append(f"{run.name}: {run.results['selection']}")
        elif run.config.get("SOLVER.BEST_ON") == "test":
            notes.append(
                f"{run.name}: SOLVER.BEST_ON is test, so its model_best.pth is chosen by the test "
                "datasets; the scores here are of the last weights."
            )
        bad = sum(None in record.values() for record in run.training)
        bad_losses = [r["iteration"] for r in run.training if number(r.get("total_loss")) is None]
        if bad_losses:
            where = format_examples(bad_losses, 3)
            notes.append(
                f"{run.name}: the loss is not finite in the records of iterations {where}."
            )
        elif bad:
            notes.append(f"{run.name}: {bad} records have values that are not defined ({MISSING}).")
        if run.datasets and not all(s.get("confusion-matrix") for s in run.datasets.values()):
            notes.append(
                f"{run.name}: its results.json is of an earlier version, without confusion matrix "
                "and scores of images; `clouds eval` writes them."
            )
    return notes


def _section(
    runs: Sequence[Run], name: str, samples: Sequence[Sample], embedder: Embedder
) -> DatasetSection:
    found = [normalized(run.name, run.datasets[name]) for run in runs if name in run.datasets]
    section = DatasetSection(
        name, class_table(runs, name), [matrix for matrix in found if matrix is not None]
    )
    own = [sample for sample in samples if sample.dataset == name]
    views = [_sample_view(runs, sample, embedder) for sample in own]
    section.samples = [view for view in views if len(view.tiles) > 2]
    if section.samples:
        maps = [label for s in own for label in (s.label, *s.predictions.values())]
        section.legend = legend_of(own[0].label_space, present_ids(maps))
    else:
        section.panels = [tile for run in runs for tile in _panels(run, name, embedder)]
    return section


def _sample_view(runs: Sequence[Run], sample: Sample, embedder: Embedder) -> SampleView:
    """Image, label and predictions; without images that exceed the limit."""
    colorize = sample.label_space.colorize
    tiles = [
        Tile("image", embedder.photo(sample.image)),
        Tile("label", embedder.colors(colorize(sample.label))),
    ]
    for run in runs:
        if run.name in sample.predictions:
            score = run.image_scores.get(sample.dataset, {}).get(sample.choice.file)
            text = MISSING if score is None else f"{score:.1f} %"
            uri = embedder.colors(colorize(sample.predictions[run.name]))
            what = "prediction" if len(runs) == 1 else run.name
            tiles.append(Tile(f"{what}, mIoU {text}", uri))
    shown = tuple(tile for tile in tiles if tile.uri)
    return SampleView(sample.choice.file, sample.choice.reasons, shown)


def _panels(run: Run, name: str, embedder: Embedder) -> list[Tile]:
    """The panels that the evaluation of a run has drawn for a dataset."""
    files = sorted((run.folder / VISUALIZATIONS / name).glob("*.png"))
    uris = [embedder.photo(read_image(file), PANEL_WIDTH) for file in files]
    return [Tile(f"{run.name}: {name}", uri) for uri in uris if uri]
