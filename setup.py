"""Metadata is in pyproject.toml; this adds the configs and prompts to the package that is built."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RESOURCES = ("configs", "prompts")
"""Top folders of the repository that become folders of the package `clouds`."""


class BuildWithResources(build_py):
    """Copies the resources, too; an editable installation reads them in the checkout."""

    def run(self) -> None:
        """Build."""
        super().run()
        if self.editable_mode:
            return
        for name in RESOURCES:
            target = Path(self.build_lib, "clouds", name)
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(Path(__file__).resolve().parent / name, target)


setup(cmdclass={"build_py": BuildWithResources})
