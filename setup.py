"""Packages: what pyproject.toml cannot say is that `experiments/` is installed as a part of varkit."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["varkit", "varkit.*"]), "varkit.experiments"],
    package_dir={"varkit.experiments": "experiments"},
)
