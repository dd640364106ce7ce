"""The structure of the code: layers, imports, sizes, and the files that a training image passes."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import write
from PIL import Image
from tiny_model import tiny_config

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    "version",
    "files",
    "messages",
    "plugins",
    "resources",
    "downloads",
    "weights_io",
    "weights_record",
    "yaml_core",
    "d2",
    "device",
    "comm",
    "environment",
    "data",
    "config",
    "ops",
    "visualizer",
    "self_training",
    "modeling",
    "evaluation",
    "engine",
    "inference",
    "report",
    "export",
    "generation",
    "ablation",
    "cli",
    "__main__",
)
"""Folders and files of `clouds/`, lowest first: a module imports from lower ones and its own."""

LAZY_LAYER = "cli"
"""The layer whose function-level imports are allowed, so that --help is fast."""

LAZY_IMPORTS = {
    # The package alone and the names of datasets are wanted without torch, which takes seconds.
    ("clouds", "clouds.engine.defaults"),
    ("clouds", "clouds.inference.load"),
    ("clouds.data.datasets.catalog", "clouds.d2"),
    # Kernels import the module that selects them, and Triton may not be installed.
    ("clouds.ops.deformable_attention", "clouds.ops.deformable_attention_cpu"),
    ("clouds.ops.deformable_attention", "clouds.ops.deformable_attention_triton"),
}
"""Function-level imports of our own modules outside of LAZY_LAYER: importer, imported."""

MAX_FILES_OF_A_SOURCE_IMAGE = 21
MAX_FURTHER_FILES_OF_JOINT_TRAINING = 7
MAX_LINES_OF_THE_LIBRARY = 39_000
"""Without `clouds/cli`; 16,000 before inference, registered datasets, and the handling of damaged
files, interruptions and hanging processes: features raise it."""

MAX_LINES_OF_A_FILE = 450
MAX_LINES_OF_A_FUNCTION = 60


def files_of(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


@cache
def modules() -> dict[str, Path]:
    """All modules of the library, by name."""
    names = {}
    for path in files_of("clouds"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


class Imports(ast.NodeVisitor):
    """Our own modules that a module imports: at the top, in functions, for type checkers."""

    def __init__(self, tree: ast.AST) -> None:
        self.found: dict[str, set[str]] = {"top": set(), "function": set(), "typing": set()}
        self.place = "top"
        self.visit(tree)

    def within(self, place: str, node: ast.AST) -> None:
        before, self.place = self.place, place if self.place == "top" else self.place
        self.generic_visit(node)
        self.place = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.within("function", node)

    def visit_If(self, node: ast.If) -> None:
        # `if TYPE_CHECKING or …:` runs as well
        self.within("typing" if ast.unparse(node.test) == "TYPE_CHECKING" else self.place, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if module.split(".")[0] != "clouds":
            return
        for alias in node.names:
            full = f"{module}.{alias.name}"
            self.found[self.place].add(full if full in modules() else module)

    def visit_Import(self, node: ast.Import) -> None:
        own = {alias.name for alias in node.names if alias.name.split(".")[0] == "clouds"}
        self.found[self.place] |= own


@cache
def imports() -> dict[str, dict[str, set[str]]]:
    return {name: Imports(ast.parse(p.read_text())).found for name, p in modules().items()}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_is_in_a_layer():
    assert {layer(name) for name in modules()} - {""} == set(LAYERS)


def test_no_module_imports_from_a_higher_layer():
    order = {name: i for i, name in enumerate(LAYERS)} | {"": len(LAYERS)}
    upward = [
        f"{module} imports {other}"
        for module, found in imports().items()
        for place in ("top", "function")
        for other in found[place]
        if order[layer(other)] > order[layer(module)] and (module, other) not in LAZY_IMPORTS
    ]
    assert upward == []


def test_imports_in_functions_are_the_listed_ones():
    found = {
        (module, other)
        for module, places in imports().items()
        for other in places["function"]
        if layer(module) != LAZY_LAYER
    }
    assert found == LAZY_IMPORTS


def test_the_command_line_imports_nothing_of_other_layers_at_the_top_but_messages_and_plugins():
    light = {LAZY_LAYER, "messages", "plugins"}
    found = {
        (module, other)
        for module, places in imports().items()
        for other in places["top"]
        if layer(module) == LAZY_LAYER and layer(other) not in light
    }
    assert found == set()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node, by removing nodes without imports."""
    left = {name: set(others) & graph.keys() - {name} for name, others in graph.items()}
    while leaves := {name for name, others in left.items() if not others}:
        left = {n: others - leaves for n, others in left.items() if n not in leaves}
    while roots := left.keys() - {o for others in left.values() for o in others}:
        left = {name: others for name, others in left.items() if name not in roots}
    return sorted([name, *sorted(others)] for name, others in left.items())


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"], ["c", "b"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_circle_between_files():
    assert circles({module: found["top"] for module, found in imports().items()}) == []


def test_no_two_folders_import_each_other():
    graph = defaultdict(set)
    for module, found in imports().items():
        graph[layer(module)] |= {layer(other) for other in found["top"] | found["function"]}
    pairs = {(a, b) for a in graph for b in graph[a] if a < b and a in graph.get(b, ())}
    # an allowed function-level import: datasets are listed in Detectron2's catalogs
    assert pairs == set()


def test_the_library_does_not_import_projects():
    projects = {p.name for p in (ROOT / "projects").glob("*/*/") if (p / "__init__.py").is_file()}
    assert projects
    for path in files_of("clouds"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {*projects, "projects"}, path


def test_sizes():
    sources = files_of("clouds", "projects", "tools", "benchmarks")
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in sources}
    library = sum(count for name, count in lines.items() if name.startswith("clouds/"))
    library -= sum(count for name, count in lines.items() if name.startswith("clouds/cli/"))
    assert library <= MAX_LINES_OF_THE_LIBRARY
    assert {n: c for n, c in lines.items() if c > MAX_LINES_OF_A_FILE} == {}
    long_functions = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_LINES_OF_A_FUNCTION
    }
    assert long_functions == {}


# ------------------------------------------------- files from record to loss


class Tracer:
    """Files of the library whose functions are called."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def __enter__(self) -> Tracer:
        sys.setprofile(self._call)
        return self

    def __exit__(self, *args: object) -> None:
        sys.setprofile(None)

    def _call(self, frame, event: str, arg: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and (ROOT / "clouds") in path.parents:
            self.files.add(path.relative_to(ROOT / "clouds").as_posix())


def traced_files(names: tuple[str, ...], refiner: str = "none") -> set[str]:
    """Files that one image of each dataset passes, from its record to the losses."""
    from clouds.data.build import build_train_loader
    from clouds.data.datasets import get_dataset
    from clouds.modeling.build import build_seeded

    cfg = tiny_config(DATASETS__TRAIN=names, MODEL__CLOUDS__REFINER=refiner)
    cfg.INPUT.CROP.SIZE = (64, 96)
    cfg.INPUT.SCALE_RANGE = (1.0, 1.2)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.CLOUDS.SAM.MODEL, cfg.MODEL.CLOUDS.SAM.WEIGHTS = "tiny", ""
    cfg.MODEL.CLOUDS.SAM.SIZE_THRESHOLD = 0
    model = build_seeded(cfg).train()
    mappers = build_train_loader(cfg).dataset.mappers
    records = [get_dataset(name).records()[0] for name in names]

    def step() -> None:
        model([mappers[record.domain](record, seed) for seed, record in enumerate(records)])

    step()  # what only the first step does, such as selecting a kernel, is not counted
    with Tracer() as tracer:
        step()
    return tracer.files


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write(tmp_path, "gta5", 0)
    folder = tmp_path / "stable_diffusion" / "x" / "images"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0.png")
    torch.manual_seed(0)


def test_files_from_record_to_loss(datasets):
    source = traced_files(("gta5",))
    assert len(source) <= MAX_FILES_OF_A_SOURCE_IMAGE, " ".join(sorted(source))
    for refiner in ("none", "superpixel", "sam"):
        further = traced_files(("gta5", "sd_x"), refiner) - source
        assert len(further) <= MAX_FURTHER_FILES_OF_JOINT_TRAINING, " ".join(sorted(further))
        assert "self_training/pseudo_labeler.py" in further
