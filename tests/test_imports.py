"""Who may import what, and what importing CLOUDS may do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEAM = ROOT / "clouds" / "d2"

# Slow to import and needed by a few functions only, which import them themselves.
HEAVY = (
    "cityscapesscripts",
    "diffusers",
    "matplotlib",
    "open_clip",
    "segment_anything",
    "skimage",
    "sklearn",
    "tensorboard",
    "timm",
    "transformers",
)


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all packages that a module imports anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func).lower():
            names |= {
                a.value
                for a in node.args
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            }
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "source",
    [
        "import detectron2",
        "import detectron2.data as d",
        "from detectron2.config import CfgNode",
        "def f():\n    from detectron2 import engine",
        "importlib.import_module('detectron2.layers')",
        "__import__('detectron2')",
    ],
)
def test_the_rule_sees_every_way_to_import(source):
    assert "detectron2" in imported(ast.parse(source))


def test_only_the_seam_imports_detectron2():
    files = [p for folder in ("clouds", "tools") for p in (ROOT / folder).rglob("*.py")]
    users = [p for p in files if "detectron2" in imported(ast.parse(p.read_text()))]
    assert sorted(p.relative_to(ROOT) for p in users if SEAM not in p.parents) == []
    assert any(SEAM in p.parents for p in users)


def test_the_library_does_not_import_the_projects():
    files = list((ROOT / "clouds").rglob("*.py"))
    assert [p for p in files if "street_renderer" in imported(ast.parse(p.read_text()))] == []


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "projects/street_renderer")])
    environment = os.environ | {"PYTHONPATH": paths, "CLOUDS_D2": "embedded"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def report(modules: tuple[str, ...]) -> str:
    return f"import sys; print('loaded:', [m for m in {modules!r} if m in sys.modules])"


REPORT = report(HEAVY)

ALL_MODULES = f"""
import importlib, pkgutil, clouds
for module in pkgutil.walk_packages(clouds.__path__, "clouds."):
    importlib.import_module(module.name)
{REPORT}
"""


@pytest.mark.parametrize(
    "code",
    [f"import clouds; {REPORT}", f"import clouds.d2, clouds.config; {REPORT}", ALL_MODULES],
    ids=["clouds", "seam and config", "every module"],
)
def test_importing_is_quiet_and_light(code):
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("loaded: []\n", "")


# A second or two; all that trains or reads pictures needs them, a first answer does not.
SLOW = (*HEAVY, "cv2", "numpy", "scipy", "torch", "torchvision")


def test_the_package_alone_brings_nothing_slow():
    result = run_python(f"import clouds; {report(SLOW)}")
    assert (result.stdout, result.stderr) == ("loaded: []\n", "")


# Fast enough; needed to list datasets and to render scenes.
ALLOWED = ("cv2", "numpy")


TOOLS = sorted(p for p in (ROOT / "tools").glob("*.py") if "__main__" in p.read_text())
if not (ROOT / "clouds/cli/predict.py").is_file():  # its script is there before it
    TOOLS.remove(ROOT / "tools/predict.py")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_help_comes_before_anything_slow(tool):
    code = f"""
import runpy, sys
sys.path.insert(0, {str(tool.parent)!r})  # where a script finds its neighbors
sys.argv = [{str(tool)!r}, "--help"]
try:
    runpy.run_path({str(tool)!r}, run_name="__main__")
except SystemExit as end:
    print("exit code:", end.code)
{report(tuple(m for m in SLOW if m not in ALLOWED))}
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
    assert result.stdout.endswith("exit code: 0\nloaded: []\n")


def test_the_rule_sees_what_is_slow():
    assert "'torch'" in run_python(f"import clouds.d2; {report(SLOW)}").stdout
