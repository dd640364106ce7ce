"""Mutation testing: mutmut changes a module in many ways; its tests should fail for every change.

    python tests/mutation.py [--sample N] [module ...]

A module is given by the end of its path, such as `ema` or `engine/checkpoint`; none: all of
MODULES. For each, `build/mutation/<module>` gets a copy of what its tests need, and `mutmut` runs
there. The output is one row per module, and the mutants that are not killed; `mutmut show NAME` in
that folder prints one. docs/testing.md explains those that are left.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutation"

MODULES = {
    "self_training/ema": ["self_training/test_ema.py"],
    "evaluation/confusion": ["evaluation/test_confusion.py"],
    "modeling/matcher": ["modeling/test_matcher.py", "modeling/test_criterion_weights.py"],
    "modeling/points": ["modeling/test_points.py", "modeling/test_criterion_weights.py"],
    "engine/checkpoint": [
        "engine/test_checkpoint.py",
        "engine/test_load_report.py",
        "engine/test_resume_faults.py",
        "engine/test_faulty_checkpoint_entries.py",
    ],
    "engine/newest_checkpoint": ["engine/test_newest_checkpoint.py"],
    "modeling/criterion": [
        "modeling/test_criterion.py",
        "modeling/test_criterion_weights.py",
        "modeling/test_partly_labelled.py",
    ],
    "evaluation/protocols": [
        "evaluation/test_protocols.py",
        "evaluation/test_published_protocols.py",
    ],
    "data/augmentation": [
        "data/test_augmentation.py",
        "data/test_recipe_augmentation.py",
        "data/test_color_jitter.py",
    ],
    "data/reading": ["data/test_reading.py", "data/test_labels.py"],
    "data/labels": [
        "data/test_labels.py",
        "data/test_label_space.py",
        "data/test_datasets.py",
    ],
    "data/image_files": ["data/test_reading.py", "data/test_labels.py"],
    "data/datasets/description_file": ["data/test_description_file.py", "data/test_datasets.py"],
    "data/datasets/description": [
        "data/test_datasets.py",
        "data/test_description_file.py",
        "data/test_label_space.py",
    ],
    "data/build": ["data/test_training_dataset.py", "data/test_training_sampler.py"],
    "data/loader": ["data/test_sample_loader.py"],
    "data/faults": ["data/test_faults.py"],
}
"""Modules of `clouds/`, and the files of `tests/` that test them."""

COPIED = ("clouds", "tests", "configs", "prompts", "projects", "pyproject.toml")

SETTINGS = """\
[mutmut]
source_paths=clouds/
only_mutate=clouds/{module}.py
also_copy=
    configs
    prompts
    projects
pytest_add_cli_args=
    -m
    not slow
    -p
    no:cacheprovider
pytest_add_cli_args_test_selection=
    {tests}
"""


LIST_MUTANTS = """\
import pathlib, sys
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name
path = pathlib.Path(sys.argv[1])
mutated = mutate_file_contents(str(path), path.read_text())
print(*(get_mutant_name(path, name) for name in mutated.mutant_names), sep="\\n")
"""
"""A program: prints the names of a module's mutants."""


class NoGradInside(ast.NodeTransformer):
    """`@torch.no_grad()` becomes a `with` around the body: mutmut skips decorated functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        kept = [d for d in node.decorator_list if ast.unparse(d) != "torch.no_grad()"]
        if len(kept) < len(node.decorator_list):
            node.decorator_list = kept
            first = 0 if ast.get_docstring(node) is None else 1
            context = ast.parse("with torch.no_grad():\n    pass").body[0]
            assert isinstance(context, ast.With)
            context.body, node.body[first:] = node.body[first:], [context]
        return node


def prepare(module: str) -> Path:
    """A new working folder for one of MODULES."""
    folder = WORK / module.replace("/", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, folder / name)
    tests = "\n    ".join(f"tests/{name}" for name in MODULES[module])
    (folder / "setup.cfg").write_text(SETTINGS.format(module=module, tests=tests))
    path = folder / "clouds" / f"{module}.py"
    path.write_text(ast.unparse(NoGradInside().visit(ast.parse(path.read_text()))) + "\n")
    return folder


def mutate(module: str, sample: int, processes: int) -> tuple[int, dict[str, str]]:
    """Run mutmut on one of MODULES.

    Args:
        sample: number of mutants, drawn at random with a fixed seed; 0: all.
        processes: number of mutants that are tested at a time.

    Returns:
        The number of all mutants, and of the tested ones by name 'killed', 'survived', ….

    Raises:
        subprocess.CalledProcessError: mutmut fails, for instance as a test fails without changes.
    """
    folder = prepare(module)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}

    def output(*arguments: str) -> str:
        with (folder / "log.txt").open("a") as log:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment,
                check=True,
                text=True,
                stdout=subprocess.PIPE,
                stderr=log,
            )
            log.write(done.stdout)
        return done.stdout

    names = output("-c", LIST_MUTANTS, f"clouds/{module}.py").split()
    chosen = names
    if 0 < sample < len(names):
        chosen = random.Random(0).sample(names, sample)
    output("-m", "mutmut", "run", "--max-children", str(processes), *chosen)
    lines = output("-m", "mutmut", "results", "--all", "true").splitlines()
    results = dict(line.strip().rsplit(": ", 1) for line in lines)
    return len(names), {name: results[name] for name in chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="ends of paths: ema, engine/checkpoint, …")
    parser.add_argument("--sample", type=int, default=150, help="mutants per module; 0: all")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    chosen = list(MODULES)
    if arguments.modules:
        ends = tuple(f"/{name}" for name in arguments.modules)
        chosen = [module for module in MODULES if f"/{module}".endswith(ends)]
        if len(chosen) < len(ends):
            parser.error(f"modules are {arguments.modules}; known: {', '.join(MODULES)}")
    for module in chosen:
        total, results = mutate(module, arguments.sample, arguments.processes)
        counts = Counter(results.values())
        killed = counts.pop("killed", 0) + counts.pop("timeout", 0)
        tested = len(results)
        print(f"{module}: {tested} of {total} mutants, {killed} killed ({killed / tested:.0%})")
        for name, status in results.items():
            if status not in ("killed", "timeout"):
                print(f"    {name}: {status}")


if __name__ == "__main__":
    main()
