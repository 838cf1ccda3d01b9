"""Finds the packages of the three trees; the metadata stands in setup.cfg, which can search one."""

from setuptools import find_packages, setup

setup(
    packages=find_packages("src") + find_packages(include=["kernels_pallas*", "experiments*"]),
    package_dir={
        "olmax": "src/olmax",
        "kernels_pallas": "kernels_pallas",
        "experiments": "experiments",
    },
    package_data={
        "experiments": ["**/*.json", "**/*.html", "**/*.md"],
        "olmax": ["**/*.html", "**/*.json"],
    },
)
