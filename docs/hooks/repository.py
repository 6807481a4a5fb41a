"""Makes the site of more than docs/: of the READMEs and results that lie beside the code.

A page is written for its place in the repository, where its links work too. Here every link between
files is turned into one between pages. A link to what is no page, such as a source file, fails the
build: name the file instead.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"

# Beside docs/ itself; folders of results come with their tables and pictures.
DOCUMENTS = ["CHANGELOG.md", "CONTRIBUTING.md", "kernels/*/README.md"]
RESULTS = ["benchmarks/results/*/README.md", "benchmarks/results/*/*.png"]

# ](target#anchor) and ](target#anchor "title"), not of an outside address.
LINK = re.compile(r"(\]\()(?!\w+:)([^)\s#]+)((?:#[^)\s]*)?(?:\s[^)]*)?\))")
FENCE = re.compile(r"^(?: {4,}|\t)|^\s*(```|~~~)")


@event_priority(100)  # before mkdocstrings, which ignores folders that are not there yet
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay the sources out as a wheel would install them: mkdocstrings reads them from there.

    Copies, for a package's links would be followed to folders that do not lie as the wheel's do.
    """
    package = ROOT / "build/docs/sources/mocapsnet"
    shutil.rmtree(package, ignore_errors=True)
    others = shutil.ignore_patterns("*.pyc", "results")
    shutil.copytree(ROOT / "mocapsnet", package, ignore=others)
    for name in ("kernels", "train", "benchmarks"):
        shutil.copytree(ROOT / name, package / name, ignore=others)
    for section in config.nav or []:
        if "Results" in section:
            section["Results"] += machines()
    return config


def machines() -> list[dict[str, str]]:
    """Navigation entries of the machines that were measured."""
    found = sorted(path.relative_to(ROOT) for path in ROOT.glob(RESULTS[0]))
    return [{f"Measured: {path.parent.name}": path.as_posix()} for path in found]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in DOCUMENTS + RESULTS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.abs_src_path is None:  # made by a hook
        return markdown
    here = page.file.src_uri
    folder = Path(page.file.abs_src_path).parent.relative_to(ROOT).as_posix()

    def link(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if (ROOT / path).is_dir():
            path = posixpath.join(path, "README.md")
        page_path = path.removeprefix(DOCS)
        return before + os.path.relpath(page_path, posixpath.dirname(here) or ".") + after

    lines, fenced = [], False
    for line in markdown.split("\n"):
        fence = FENCE.match(line)
        fenced ^= bool(fence and fence[1])
        lines.append(line if fenced or fence else LINK.sub(link, line))
    return "\n".join(lines)
