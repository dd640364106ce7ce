"""Metadata is in pyproject.toml; this adds files that are not modules to the packages built."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RESOURCES = {
    "configs": "clouds/configs",
    "prompts": "clouds/prompts",
    "projects/street_models/weights": "street_models/weights",
}
"""Folders of the repository, and of the packages that they become."""


class BuildWithResources(build_py):
    """Copies the resources, too; an editable installation reads them in the checkout."""

    def run(self) -> None:
        """Build."""
        super().run()
        if self.editable_mode:
            return
        for name, built in RESOURCES.items():
            target = Path(self.build_lib, built)
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(Path(__file__).resolve().parent / name, target)


setup(cmdclass={"build_py": BuildWithResources})
