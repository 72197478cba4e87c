"""The stub that older build front ends ask for; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
