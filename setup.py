"""Maps the repository's four folders onto the import package `mocapsnet`.

Everything else about the distribution stands in pyproject.toml.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "mocapsnet": "mocapsnet",
    "mocapsnet.kernels": "kernels",
    "mocapsnet.train": "train",
    "mocapsnet.benchmarks": "benchmarks",
}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    ],
)
