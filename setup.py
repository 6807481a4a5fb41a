"""Maps the repository's four folders onto the import package `mocapsnet`, and makes its index page.

Everything else about the distribution stands in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {
    "mocapsnet": "mocapsnet",
    "mocapsnet.kernels": "kernels",
    "mocapsnet.train": "train",
    "mocapsnet.benchmarks": "benchmarks",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)\s]+)\)")


def index_page(readme: str, repository: str | None) -> str:
    """README.md for a package index, which holds none of the files that it refers to.

    References become addresses in the public repository, "Repository" of `project.urls`. Until
    there is one, pictures are left out and links become their words.
    """

    def address(match: re.Match[str]) -> str:
        picture, words, path = match.groups()
        if repository:
            return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/HEAD/{path})"
        return "" if picture else words

    return re.sub(r"\n{3,}", "\n\n", LINK.sub(address, readme))


public = re.search(r'^Repository = "(.+?)/?"$', (ROOT / "pyproject.toml").read_text(), re.M)
setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    ],
    long_description=index_page((ROOT / "README.md").read_text("utf-8"), public and public[1]),
    long_description_content_type="text/markdown",
)
