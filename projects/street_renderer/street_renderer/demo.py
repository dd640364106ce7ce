"""The complete method on a small scale on a CPU, from prompts to scores on unseen domains.

Renders a labeled source and three unseen target domains, generates images from prompts, and trains
in two phases: source pre-training, then joint training on source and generated images. It runs the
commands of a real experiment, prints each of them, and collects the results in OUTPUT/index.html.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clouds.cli.command_line import add_overrides, given_overrides, path_or_name

DATASETS = ("gta5", "cityscapes_val", "bdd_val", "mapillary_val")
PHASES = {
    "warmup": "source pre-training: source only",
    "joint": "joint training: source and generated images",
}


STYLE = """
body { font: 16px/1.4 sans-serif; margin: 0 auto; padding: 1em; max-width: 1400px; }
img { max-width: 100%; height: auto; vertical-align: top; }
pre { background: #eee; padding: 1em; }
table { border-collapse: collapse; }
td, th { padding: .2em 1em .2em 0; text-align: left; vertical-align: top; }
.wide, pre { overflow-x: auto; margin: 1em 0; }
@media (max-width: 700px) {
  td, th { padding-right: .6em; font-size: 14px; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .wide img { max-width: none; width: 900px; }
}
"""
"""On a phone, wide images keep a readable size and scroll sideways."""


def run(command: list[str], environment: dict[str, str]) -> str:
    """Print a command of CLOUDS, run it, and return it as a shell command."""
    shown = shlex.join(["clouds", *command])
    print(f"\n$ {shown}", flush=True)
    program = [sys.executable, "-m", "clouds", *command]
    result = subprocess.run(program, env={**os.environ, **environment})
    if result.returncode:
        sys.exit(f"the demo failed: the command above exited with status {result.returncode}")
    return shown


def score_table(results: dict[str, dict[str, Any]]) -> str:
    """Phases as rows, unseen domains as columns, mIoU in percent."""
    names = list(next(iter(results.values()))["datasets"])
    head = "".join(f"<th>{html.escape(name)}" for name in [*names, "mean"])
    head = head.replace("_", "_<wbr>")  # where a line may break
    rows = []
    for phase, result in results.items():
        scores = [result["datasets"][name]["mIoU"] for name in names]
        cells = "".join(f"<td>{score:.1f}" for score in [*scores, result["mean"]["mIoU"]])
        rows.append(f"<tr><td>{html.escape(PHASES[phase])}{cells}")
    return f"<div class=wide><table><tr><th>mIoU, %{head}{''.join(rows)}</table></div>"


def pseudo_label_table(result: dict[str, Any]) -> str:
    """mIoU of the pseudo-labels of the generated images, in percent."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{score:.1f}"
        for labels in result["pseudo-labels"].values()
        for name, score in labels["mIoU"].items()
    )
    table = f"<table><tr><th>labels of generated images<th>mIoU, %{rows}</table>"
    return f"<div class=wide>{table}</div>"


def wide_image(source: str, text: str) -> str:
    """An image that is wider than a phone, as a link to its file, with a text in its place."""
    source, text = html.escape(source), html.escape(text)
    return f'<div class=wide><a href="{source}"><img src="{source}" alt="{text}"></a></div>'


def gallery(folder: Path, at: Path) -> str:
    """The panels of one run, in images relative to the folder `at`."""
    panels = sorted((folder / "visualizations").glob("*/*.png"))
    return "".join(wide_image(os.path.relpath(p, at), p.parent.name) for p in panels)


def page(
    commands: list[str], results: dict[str, dict[str, Any]], output: Path, generated: Path
) -> str:
    """The results as HTML: scores, commands, images."""
    sheet = os.path.relpath(generated / "contact_sheet.png", output)
    return (
        '<!doctype html><html lang="en"><meta charset=utf-8><title>CLOUDS demo</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><h1>CLOUDS demo</h1>"
        "<p>Trained on rendered scenes that look like a game, then jointly with images generated "
        "from prompts, without labels. Evaluated on three domains that are not part of the "
        "training.</p>"
        f"{score_table(results)}{pseudo_label_table(results['joint'])}"
        f"<pre>{html.escape((2 * chr(10)).join(commands))}</pre>"
        f"<h2>After joint training</h2>{gallery(output / 'joint', output)}"
        f"<h2>After source pre-training</h2>{gallery(output / 'warmup', output)}"
        f"<h2>Images generated from prompts</h2>{wide_image(sheet, 'contact sheet')}"
        f"<h2>The domains</h2>{wide_image('scenes.png', 'contact sheet')}"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=__doc__,
        epilog="example:\n  clouds demo --output output/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("datasets/demo"), help="dataset root")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--train", type=int, default=500, help="labeled training images")
    parser.add_argument("--val", type=int, default=40, help="images of each unseen domain")
    parser.add_argument("--generated", type=int, default=300, help="images generated from prompts")
    parser.add_argument(
        "--prompts", type=path_or_name, default="street_scenes", metavar="FILE",
        help="one per line, or the name of prompts of the package (default: %(default)s)",
    )  # fmt: skip
    add_overrides(parser, "of both phases' configs, SOLVER.MAX_ITER 100")
    args = parser.parse_args(argv)
    args.opts = given_overrides(parser, args.opts)
    for name in ("data", "output"):
        setattr(args, name, getattr(args, name).expanduser())
    return args


def generated_folder(args: argparse.Namespace) -> Path:
    """Folder of the dataset sd_demo."""
    folder: Path = args.data / "stable_diffusion" / "demo"
    return folder


def commands_of(args: argparse.Namespace) -> list[list[str]]:
    """The commands of the demo, in order, as arguments of `clouds`."""
    render = ["make-demo-data", "--output", str(args.data), "--datasets", *DATASETS]
    render += ["--train", str(args.train), "--val", str(args.val)]
    render += ["--contact-sheet", str(args.output / "scenes.png")]
    generate = ["generate", "--generator", "procedural"]
    generate += ["--prompts", args.prompts, "--count", str(args.generated)]
    generate += ["--height", "160", "--width", "320", "--output", str(generated_folder(args))]
    trainings = []
    for phase in PHASES:
        command = ["train", "--config-file", f"demo/{phase}", "--overwrite"]
        command += ["OUTPUT_DIR", str(args.output / phase)]
        if phase == "joint":
            command += ["MODEL.WEIGHTS", str(args.output / "warmup" / "model_final.pth")]
        trainings.append([*command, *args.opts])
    return [render, generate, *trainings, ["baselines", "--config-file", "demo/warmup"]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    args = parse(argv)
    started = time.monotonic()
    export = f"export DETECTRON2_DATASETS={shlex.quote(str(args.data))}"
    print(f"$ {export}")
    args.output.mkdir(parents=True, exist_ok=True)
    environment = {"DETECTRON2_DATASETS": str(args.data)}
    commands = [export, *(run(command, environment) for command in commands_of(args))]

    results = {
        phase: json.loads((args.output / phase / "results.json").read_text()) for phase in PHASES
    }
    index = args.output / "index.html"
    index.write_text(page(commands, results, args.output, generated_folder(args)))
    print(f"\nmIoU, mean over the unseen domains {', '.join(DATASETS[1:])}:")
    for phase, title in PHASES.items():
        print(f"  {title}: {results[phase]['mean']['mIoU']:.1f}")
    minutes = (time.monotonic() - started) / 60
    print(f"Done in {minutes:.1f} minutes. Open {index} for images and scores;")
    print(f"`tensorboard --logdir {shlex.quote(str(args.output))}` shows the training curves.")
