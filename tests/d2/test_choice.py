"""The rules by which one side of the seam is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clouds.d2.backend import choose

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def detectron2_is(tmp_path, monkeypatch):
    """Put a package `detectron2` with the given source in front of any real one."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == "detectron2"]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)

    def install(source):
        (tmp_path / "detectron2").mkdir()
        (tmp_path / "detectron2" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("detectron2", None)


def without_detectron2(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)


@pytest.mark.parametrize("environment", [{}, {"CLOUDS_D2": ""}, {"CLOUDS_D2": "auto"}])
def test_auto_is_embedded_without_the_module(monkeypatch, environment):
    without_detectron2(monkeypatch)
    assert choose(environment) == "embedded"


@pytest.mark.parametrize("environment", [{}, {"CLOUDS_D2": "auto"}, {"CLOUDS_D2": "detectron2"}])
def test_a_good_install_is_used(detectron2_is, environment):
    detectron2_is("")
    assert choose(environment) == "detectron2"


def test_embedded_does_not_touch_an_install(detectron2_is):
    detectron2_is("raise SystemError('must not be imported')")
    assert choose({"CLOUDS_D2": "embedded"}) == "embedded"


def test_detectron2_without_the_module_says_how_to_get_it(monkeypatch):
    without_detectron2(monkeypatch)
    with pytest.raises(ModuleNotFoundError, match=r"not installed.*pip install") as error:
        choose({"CLOUDS_D2": "detectron2"})
    assert error.value.name == "detectron2"


@pytest.mark.parametrize(
    "source",
    [
        "raise ImportError('libcudart.so.11: cannot open shared object file')",
        "import detectron2._C",
        "import a_package_that_is_not_there",
    ],
)
@pytest.mark.parametrize("wanted", ["auto", "detectron2"])
def test_a_broken_install_raises(detectron2_is, source, wanted):
    detectron2_is(source)
    with pytest.raises(ImportError, match=r"installed but cannot be imported.*CLOUDS_D2=embedded"):
        choose({"CLOUDS_D2": wanted})


@pytest.mark.parametrize("wanted", ["Detectron2", "yes", "d2", " embedded"])
def test_a_bad_value_lists_the_allowed_ones(wanted):
    with pytest.raises(ValueError, match="auto, detectron2, embedded") as error:
        choose({"CLOUDS_D2": wanted})
    assert repr(wanted) in str(error.value)


def import_seam(wanted, *path):
    environment = os.environ | {
        "CLOUDS_D2": wanted,
        "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]),
    }
    command = [sys.executable, "-c", "import clouds.d2; print(clouds.d2.BACKEND)"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_an_install_that_lacks_a_noun_is_not_mixed_with_ours(tmp_path):
    # `detectron2` and `detectron2.config` import; everything else of it is missing.
    package = tmp_path / "detectron2"
    (package / "config").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0'")
    (package / "config" / "__init__.py").write_text("CfgNode = configurable = object()")
    result = import_seam("auto", tmp_path)
    assert result.returncode != 0
    assert "installed but cannot be imported: No module named 'detectron2.data'" in result.stderr
    assert import_seam("embedded", tmp_path).stdout == "embedded\n"
