"""Show the method at work, small, on a CPU: paint data, train, evaluate on unseen domains.

    python tools/demo.py

Runs the same commands that a real experiment takes, prints each before it runs, and gathers what
came out in OUTPUT/index.html. Nothing is downloaded.
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

HERE = Path(__file__).resolve().parent
DATASETS = ("gta5", "cityscapes_val", "bdd_val", "mapillary_val")


def run(command: list[str], environment: dict[str, str]) -> str:
    """Print a command, run it, and return it as one would type it."""
    shown = shlex.join(["python", *command])
    print(f"\n$ {shown}", flush=True)
    result = subprocess.run([sys.executable, *command], env={**os.environ, **environment})
    if result.returncode:
        sys.exit(f"the demo stops: the command above ended with status {result.returncode}")
    return shown


def page(commands: list[str], results: dict[str, object], pictures: list[Path], at: Path) -> str:
    """The result as HTML: scores, then image, label and prediction side by side."""
    scores = results["datasets"]
    assert isinstance(scores, dict)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{score['mIoU']:.1f}</td></tr>"
        for name, score in scores.items()
    )
    shown = "".join(
        f'<p><img src="{html.escape(os.path.relpath(p, at))}" alt="{html.escape(p.parent.name)}">'
        f"<br>{html.escape(p.parent.name)}</p>"
        for p in pictures
    )
    return (
        "<!doctype html><meta charset=utf-8><title>CLOUDS demo</title>"
        "<style>body{font:16px sans-serif;margin:2em;max-width:1200px}img{max-width:100%}"
        "td,th{padding:.2em 1em;text-align:left}pre{background:#eee;padding:1em}</style>"
        "<h1>CLOUDS demo</h1><p>Trained on painted scenes that look like a game, scored on three "
        "domains that training never saw.</p>"
        f"<table><tr><th>unseen domain<th>mIoU, %</tr>{rows}</table>"
        f"<pre>{html.escape(chr(10).join(commands))}</pre>{shown}"
        '<h2>What the domains look like</h2><img src="scenes.png" alt="contact sheet">'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("datasets/demo"), help="painted here")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--config-file", default="configs/demo/warmup.yaml")
    parser.add_argument("--train", type=int, default=500, help="training pictures")
    parser.add_argument("--val", type=int, default=40, help="pictures of each unseen domain")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()

    started = time.monotonic()
    data = {"DETECTRON2_DATASETS": str(args.data)}
    export = f"export DETECTRON2_DATASETS={shlex.quote(str(args.data))}"
    print(f"$ {export}")
    tool = os.path.relpath(HERE)
    paint = [f"{tool}/make_demo_data.py", "--output", str(args.data), "--datasets", *DATASETS]
    paint += ["--train", str(args.train), "--val", str(args.val)]
    paint += ["--contact-sheet", str(args.output / "scenes.png")]
    train = [f"{tool}/train_net.py", "--config-file", args.config_file]
    train += ["OUTPUT_DIR", str(args.output), *args.opts]
    baselines = [f"{tool}/trivial_baselines.py", "--config-file", args.config_file]
    args.output.mkdir(parents=True, exist_ok=True)
    commands = [export, *(run(command, data) for command in (paint, train, baselines))]

    results = json.loads((args.output / "results.json").read_text())
    pictures = sorted((args.output / "pictures").glob("*/*.png"))
    index = args.output / "index.html"
    index.write_text(page(commands, results, pictures, args.output))
    minutes = (time.monotonic() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes. Open {index} for pictures and scores;")
    print(f"`tensorboard --logdir {args.output}` shows the course of training.")


if __name__ == "__main__":
    main()
