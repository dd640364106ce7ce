"""The documentation site is built without warnings, and the notebook can be executed."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from engine_toy import script_environment

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


class Requests(HTMLParser):
    """URLs of other servers that a page loads: scripts, style sheets, images."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        url = dict(attrs).get({"script": "src", "img": "src", "link": "href"}.get(tag, ""), "")
        if (url or "").startswith(("http:", "https:", "//")):
            self.urls.append(url)


def test_the_site_is_built(tmp_path):
    pytest.importorskip("mkdocs", reason="needs mkdocs: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=script_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "config.html").read_text()
    assert "MODEL.CLOUDS.REFINER" in page and "ALPHA_EMA" in page
    assert 'href="../own_data.html"' in (tmp_path / "extend" / "index.html").read_text()
    for name in ("index", "training", "api"):
        requests = Requests()
        requests.feed((tmp_path / f"{name}.html").read_text())
        assert requests.urls == []


def test_the_notebook_can_be_executed(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel: make docs")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: make docs")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, resources=resources).execute()
    (overlay,) = [
        output["data"]
        for cell in notebook.cells
        if cell["source"] == "result.overlay()"
        for output in cell["outputs"]
    ]
    assert "image/png" in overlay
