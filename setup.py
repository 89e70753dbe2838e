"""Metadata is in pyproject.toml; nothing is compiled."""

from setuptools import setup

setup()
