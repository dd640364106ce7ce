"""What `clouds demo` does: it makes the data, trains, and writes the results."""

from __future__ import annotations

import argparse
import html
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE
from typing import Any

from clouds.ablation.plan import Run
from clouds.cli.command_line import user_errors_in_one_line
from clouds.environment import setup_logging
from clouds.messages import install_extra
from street_renderer.ablation import (
    FURTHER_ROWS,
    LABELS,
    RELIT,
    ROWS,
    THREADS,
    TITLES,
    Setting,
    plan,
    record,
    table_of,
    train,
    write,
)

DATASETS = ("gta5", "cityscapes_val", "bdd_val", "mapillary_val")
SIZE = (160, 320)
"""Height and width of generated images, pixels."""

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


def in_shell(command: Sequence[str]) -> str:
    """A command of CLOUDS as a shell command."""
    return shlex.join(["clouds", *command])


def program(command: Sequence[str]) -> list[str]:
    """The same as arguments of a process."""
    return [sys.executable, "-m", "clouds", *command]


def run(command: list[str], environment: dict[str, str]) -> str:
    """Print a command of CLOUDS, run it, and return it as a shell command."""
    print(f"\n$ {in_shell(command)}", flush=True)
    result = subprocess.run(program(command), env={**os.environ, **environment})
    exit_unless_zero(result.returncode)
    return in_shell(command)


def exit_unless_zero(status: int) -> None:
    """Exit with a message if the command that was printed last failed."""
    if status:
        sys.exit(f"the demo failed: the command above exited with status {status}")


@contextmanager
def beside(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """Run a command of CLOUDS beside the body of the `with`; then print it and its output.

    Yields:
        The command as a shell command.
    """
    with subprocess.Popen(
        program(command), env={**os.environ, **environment}, stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        try:
            yield in_shell(command)
            output, errors = process.communicate()
        finally:
            process.kill()  # does nothing to one that has ended
    print(f"\n$ {in_shell(command)}\n{output}", end="", flush=True)
    if process.returncode:
        sys.stderr.write(errors)
    exit_unless_zero(process.returncode)


Result = Mapping[str, Any]
"""The content of a results.json."""


def score_table(results: Mapping[str, Result]) -> str:
    """Trainings as rows, unseen domains as columns, mIoU in percent."""
    domains = list(next(iter(results.values()))["datasets"])
    head = "".join(f"<th>{html.escape(domain)}" for domain in [*domains, "mean"])
    head = head.replace("_", "_<wbr>")  # where a line may break
    rows = []
    for name, result in results.items():
        scores = [result["datasets"][domain]["mIoU"] for domain in domains]
        cells = "".join(f"<td>{score:.1f}" for score in [*scores, result["mean"]["mIoU"]])
        rows.append(f"<tr><td>{html.escape(TITLES[name])}{cells}")
    return f"<div class=wide><table><tr><th>mIoU, %{head}{''.join(rows)}</table></div>"


def percent(score: float | None) -> str:
    """A score with one decimal; '-' where it is not defined."""
    return "-" if score is None else f"{score:.1f}"


def pseudo_label_table(results: Mapping[str, Result]) -> str:
    """mIoU of the label maps of the generated images, in percent, by training."""
    head = "".join(f"<th>{html.escape(name)}" for name in LABELS)
    rows = []
    for name, result in results.items():
        for labels in result["pseudo-labels"].values():
            cells = "".join(f"<td>{percent(labels['mIoU'][label])}" for label in LABELS)
            rows.append(f"<tr><td>{html.escape(TITLES[name])}{cells}")
    table = f"<table><tr><th>labels of generated images, mIoU, %{head}{''.join(rows)}</table>"
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
    commands: Sequence[str], results: Mapping[str, Result], output: Path, generated: Path
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
        f"{score_table(results)}{pseudo_label_table(results)}"
        f"<pre>{html.escape((2 * chr(10)).join(commands))}</pre>"
        f"<h2>After joint training</h2>{gallery(output / 'joint', output)}"
        f"<h2>After source pre-training</h2>{gallery(output / 'warmup', output)}"
        f"<h2>Images generated from prompts</h2>{wide_image(sheet, 'contact sheet')}"
        f"<h2>The domains</h2>{wide_image('scenes.png', 'contact sheet')}"
    )


def generated_folder(args: argparse.Namespace) -> Path:
    """Folder of the dataset sd_demo."""
    folder: Path = args.data / "stable_diffusion" / "demo"
    return folder


def data_commands(args: argparse.Namespace) -> list[list[str]]:
    """The commands that make the data, in order, as arguments of `clouds`."""
    render = ["make-demo-data", "--output", str(args.data), "--datasets", *DATASETS]
    render += ["--train", str(args.train), "--val", str(args.val)]
    render += ["--contact-sheet", str(args.output / "scenes.png")]
    generate = ["generate", "--generator", "procedural", "--prompts", args.prompts]
    generate += ["--count", str(args.generated)]
    size = ["--height", str(SIZE[0]), "--width", str(SIZE[1])]
    commands = [render, [*generate, *size, "--output", str(generated_folder(args))]]
    if args.full:
        relit = generated_folder(args).with_name(RELIT)
        commands.append([*generate, *size, "--condition", "gta5", "--output", str(relit)])
    return commands


def run_demo(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run the demo with the parsed arguments `args` of the command line `argv`."""
    started = time.monotonic()
    rows = {**ROWS, **FURTHER_ROWS} if args.full else ROWS
    commands = [f"export DETECTRON2_DATASETS={shlex.quote(str(args.data))}"]
    environment = {"DETECTRON2_DATASETS": str(args.data)}
    with user_errors_in_one_line():
        runs = plan(rows, args.seeds, args.output, args.opts, full=args.full)
        args.output.mkdir(parents=True, exist_ok=True)
        setup_logging(str(args.output), 0)
        print(f"$ {commands[0]}")
        commands += [run(command, environment) for command in data_commands(args)]
        commands += [one.shown_command() for one in runs]
        print("\n" + "\n".join(f"$ {command}" for command in commands[-len(runs) :]), flush=True)
        with baselines(args, environment) as others:
            failure = train(runs, args.processes, environment, afresh=not args.full)
            if failure:
                sys.exit(f"the demo failed: {failure}")
    if args.full:
        report_full(args, rows, runs, argv)
    else:
        report(args, runs, [*commands, *others])
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")


@contextmanager
def baselines(args: argparse.Namespace, environment: dict[str, str]) -> Iterator[list[str]]:
    """Score the trivial baselines while source pre-training leaves a core idle; not of --full.

    Yields:
        The commands of it as shell commands.
    """
    if args.full:
        yield []
        return
    one_core = {**environment, "OMP_NUM_THREADS": str(THREADS)}
    with beside(["baselines", "--config-file", "demo/warmup"], one_core) as command:
        yield [command]


def report(args: argparse.Namespace, runs: Sequence[Run], commands: Sequence[str]) -> None:
    """Write the page of results, and print the scores."""
    results = {one.setting: json.loads((one.folder / "results.json").read_text()) for one in runs}
    index = args.output / "index.html"
    index.write_text(page(commands, results, args.output, generated_folder(args)))
    print(f"\nmIoU, mean over the unseen domains {', '.join(DATASETS[1:])}:")
    for name, result in results.items():
        print(f"  {TITLES[name]}: {result['mean']['mIoU']:.1f}")
    print("mIoU of the labels of generated images:")
    for name, result in results.items():
        for labels in result["pseudo-labels"].values():
            scores = ", ".join(f"{n} {percent(labels['mIoU'][n])}" for n in LABELS)
            print(f"  {TITLES[name]}: {scores}")
    print(f"Open {index} for images and scores;")
    print(f"`tensorboard --logdir {shlex.quote(str(args.output))}` shows the training curves.")
    compare(args, list(results))


def report_command(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The command that compares trainings in one file, as arguments of `clouds`."""
    folders = [str(args.output / ROWS[name].folder) for name in names]
    return ["report", *folders, "--output", str(args.output / "report.html")]


def compare(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Compare the trainings in report.html; without plotly, print how."""
    command = report_command(args, names)
    if find_spec("plotly") is not None:
        run(command, {"DETECTRON2_DATASETS": str(args.data)})
        return
    print(f"To compare the trainings in one file: {install_extra('report')}, and then")
    print(f"  {in_shell(command)}")


def report_full(
    args: argparse.Namespace,
    rows: Mapping[str, Setting],
    runs: Sequence[Run],
    argv: Sequence[str],
) -> None:
    """Write and print the table of all rows and seeds."""
    command = in_shell(["demo", *argv])
    table = table_of(rows, runs)
    files = write(table, record(table, command, args.processes), args.results)
    print(f"\n{table.markdown()}\n\nWritten to {' and '.join(map(str, files))}.")
