"""The conformance suite, once with the embedded nouns and once with Detectron2's; then CLOUDS
inside Detectron2.

Detectron2 is either installed, or its plain source is named by DETECTRON2_SOURCE (a path, or
several as in PYTHONPATH). Its C++ part need not be compiled, but what it imports must be there:
omegaconf and pycocotools, beside what CLOUDS needs itself.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def run_suite(side: str, name: str = "conformance.py") -> subprocess.CompletedProcess[str]:
    """Run one file of this folder under pytest in a process whose seam is set to `side`."""
    path = [str(ROOT), os.environ.get("DETECTRON2_SOURCE", ""), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "CLOUDS_D2": side,
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def require_detectron2() -> None:
    if not os.environ.get("DETECTRON2_SOURCE") and importlib.util.find_spec("detectron2") is None:
        pytest.skip(
            "Detectron2 is not installed; set DETECTRON2_SOURCE to its source folder to run this"
        )


def test_embedded() -> None:
    result = run_suite("embedded")
    assert result.returncode == 0, result.stdout + result.stderr


def test_detectron2() -> None:
    require_detectron2()
    result = run_suite("detectron2")
    assert result.returncode == 0, result.stdout + result.stderr


def test_clouds_inside_detectron2() -> None:
    require_detectron2()
    result = run_suite("detectron2", "integration.py")
    assert result.returncode == 0, result.stdout + result.stderr
