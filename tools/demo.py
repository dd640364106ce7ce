"""Show the method at work, small, on a CPU, from prompts to scores on unseen domains.

    python tools/demo.py

Paints a labelled source and three unseen target domains, paints scenes from prompts, trains the
warm-up on the source and then jointly on source and painted scenes. Runs the same commands that a
real experiment takes, prints each before it runs, and gathers what came out in OUTPUT/index.html.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATASETS = ("gta5", "cityscapes_val", "bdd_val", "mapillary_val")
PHASES = {"warmup": "warm-up: source alone", "joint": "joint: source and generated scenes"}


def run(command: list[str], environment: dict[str, str]) -> str:
    """Print a command, run it, and return it as one would type it."""
    shown = shlex.join(["python", *command])
    print(f"\n$ {shown}", flush=True)
    result = subprocess.run([sys.executable, *command], env={**os.environ, **environment})
    if result.returncode:
        sys.exit(f"the demo stops: the command above ended with status {result.returncode}")
    return shown


def score_table(results: dict[str, dict[str, Any]]) -> str:
    """Phases as rows, unseen domains as columns, mIoU in percent."""
    names = list(next(iter(results.values()))["datasets"])
    head = "".join(f"<th>{html.escape(name)}" for name in [*names, "mean"])
    rows = []
    for phase, result in results.items():
        scores = [result["datasets"][name]["mIoU"] for name in names]
        cells = "".join(f"<td>{score:.1f}" for score in [*scores, result["mean"]["mIoU"]])
        rows.append(f"<tr><td>{html.escape(PHASES[phase])}{cells}")
    return f"<table><tr><th>mIoU, %{head}{''.join(rows)}</table>"


def pseudo_label_table(result: dict[str, Any]) -> str:
    """How right the labels of generated scenes are, by their true labels."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{score:.1f}"
        for labels in result["pseudo-labels"].values()
        for name, score in labels["mIoU"].items()
    )
    return f"<table><tr><th>labels of generated scenes<th>mIoU, %{rows}</table>"


def gallery(folder: Path, at: Path) -> str:
    """The panels of one run."""
    pictures = sorted((folder / "pictures").glob("*/*.png"))
    return "".join(
        f'<p><img src="{html.escape(os.path.relpath(p, at))}" alt="{html.escape(p.parent.name)}">'
        for p in pictures
    )


def page(
    commands: list[str], results: dict[str, dict[str, Any]], output: Path, generated: Path
) -> str:
    """The result as HTML: scores, the commands, then pictures."""
    sheet = html.escape(os.path.relpath(generated / "contact_sheet.png", output))
    return (
        "<!doctype html><meta charset=utf-8><title>CLOUDS demo</title>"
        "<style>body{font:16px sans-serif;margin:2em;max-width:1400px}img{max-width:100%}"
        "td,th{padding:.2em 1em;text-align:left}pre{background:#eee;padding:1em;overflow:auto}"
        "</style><h1>CLOUDS demo</h1><p>Trained on painted scenes that look like a game, then "
        "jointly with scenes painted from prompts, which have no labels in training. Scored on "
        "three domains that training never saw.</p>"
        f"{score_table(results)}<p></p>{pseudo_label_table(results['joint'])}"
        f"<pre>{html.escape(chr(10).join(commands))}</pre>"
        f"<h2>After joint training</h2>{gallery(output / 'joint', output)}"
        f"<h2>After the warm-up</h2>{gallery(output / 'warmup', output)}"
        f'<h2>Scenes painted from prompts</h2><img src="{sheet}" alt="contact sheet">'
        '<h2>What the domains look like</h2><img src="scenes.png" alt="contact sheet">'
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("datasets/demo"), help="painted here")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--train", type=int, default=500, help="labelled training pictures")
    parser.add_argument("--val", type=int, default=40, help="pictures of each unseen domain")
    parser.add_argument("--generated", type=int, default=300, help="scenes painted from prompts")
    parser.add_argument("--prompts", default="prompts/street_scenes.txt", help="one a line")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of both phases' configs"
    )
    return parser.parse_args()


def generated_folder(args: argparse.Namespace) -> Path:
    """The dataset sd_demo."""
    folder: Path = args.data / "stable_diffusion" / "demo"
    return folder


def plan(args: argparse.Namespace) -> list[list[str]]:
    """The commands of the demo, in order."""
    tool = os.path.relpath(HERE)
    configs = os.path.relpath(HERE.parent / "configs" / "demo")
    paint = [f"{tool}/make_demo_data.py", "--output", str(args.data), "--datasets", *DATASETS]
    paint += ["--train", str(args.train), "--val", str(args.val)]
    paint += ["--contact-sheet", str(args.output / "scenes.png")]
    generate = [f"{tool}/generate_images.py", "--generator", "procedural"]
    generate += ["--prompts", args.prompts, "--count", str(args.generated)]
    generate += ["--height", "160", "--width", "320", "--output", str(generated_folder(args))]
    trainings = []
    for phase in PHASES:
        command = [f"{tool}/train_net.py", "--config-file", f"{configs}/{phase}.yaml"]
        command += ["OUTPUT_DIR", str(args.output / phase)]
        if phase == "joint":
            command += ["MODEL.WEIGHTS", str(args.output / "warmup" / "model_final.pth")]
        trainings.append([*command, *args.opts])
    baselines = [f"{tool}/trivial_baselines.py", "--config-file", f"{configs}/warmup.yaml"]
    return [paint, generate, *trainings, baselines]


def main() -> None:
    args = parse()
    started = time.monotonic()
    export = f"export DETECTRON2_DATASETS={shlex.quote(str(args.data))}"
    print(f"$ {export}")
    args.output.mkdir(parents=True, exist_ok=True)
    environment = {"DETECTRON2_DATASETS": str(args.data)}
    commands = [export, *(run(command, environment) for command in plan(args))]

    results = {
        phase: json.loads((args.output / phase / "results.json").read_text()) for phase in PHASES
    }
    index = args.output / "index.html"
    index.write_text(page(commands, results, args.output, generated_folder(args)))
    print(f"\nmIoU, mean over the unseen domains {', '.join(DATASETS[1:])}:")
    for phase, title in PHASES.items():
        print(f"  {title}: {results[phase]['mean']['mIoU']:.1f}")
    minutes = (time.monotonic() - started) / 60
    print(f"Done in {minutes:.1f} minutes. Open {index} for pictures and scores;")
    print(f"`tensorboard --logdir {args.output}` shows the course of training.")


if __name__ == "__main__":
    main()
