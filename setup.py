"""All metadata is in pyproject.toml; this file is for `python setup.py` and old versions of pip."""

from setuptools import setup

setup()
