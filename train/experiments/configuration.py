"""Experiments as data: one JSON file each, read and checked.

    title     one line
    about     what one should know, a paragraph (may be missing)
    grid      {"dataset": [...], "model": [...], "blocks": [...], "seed": [...], ...}: options of
              `mocapsnet train` and their values; every combination is a run
    cases     [{...}, ...]: options that belong together; the grid is run for each. Either all or
              none has a "name", which then stands for the options (may be missing)
    options   {...}: options of all runs (may be missing)
    where     [{"if": {...}, "then": {...}}, ...]: options of the runs whose values are those of
              "if" (may be missing)
    columns   what the table has side by side, ["dataset", "model"] if missing; the rest is below
              one another, and seeds are averaged
    paper     [{"dataset": ..., "accuracy": 99.41, "deviation": 0.01}, ...]: numbers to print
              beside, in percent; "shown" is a text to print instead (may be missing)
    scale     {...}: what the paper used, where the file does not (may be missing)
    notes     [...]: lines below the table (may be missing)

An experiment of benchmarks has, instead of all but title, about and notes, what measured.py says.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocapsnet.train.errors import InputError
from mocapsnet.train.option_values import kinds, of_kind

CONFIGS = Path(__file__).parent / "configs"

# In this order in names and tables, but for the seed, which comes last.
AXES = ("dataset", "model", "blocks", "seed")

Keys = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Options that belong together: by what they are called in tables, and what they are."""

    keys: Keys
    options: dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """Options `then` of the runs whose keys are those of `when`."""

    when: Keys
    then: dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A number to print beside the cells whose keys are these, in percent."""

    keys: Keys
    accuracy: float
    deviation: float | None
    shown: str | None


@dataclass(frozen=True)
class Configuration:
    """An experiment that trains; the fields are those of its file.

    Attributes:
        content: the file's, for the record.
    """

    name: str
    title: str
    about: str
    notes: tuple[str, ...]
    grid: dict[str, list[Any]]
    cases: tuple[Case, ...]
    options: dict[str, Any]
    where: tuple[Rule, ...]
    columns: tuple[str, ...]
    paper: tuple[Published, ...]
    scale: dict[str, Any]
    content: dict[str, Any]

    @property
    def compared(self) -> list[str]:
        """The names of what runs differ in, in the order of names and tables; the seed is last."""
        return [*self.grid_order, *self.cases[0].keys, "seed"]

    @property
    def grid_order(self) -> list[str]:
        """The names of the grid in that order, without the seed."""
        return [*AXES[:3], *(name for name in self.grid if name not in AXES)]

    @property
    def reserved(self) -> set[str]:
        """Options that the file varies, so that a command line cannot set them for all runs."""
        return {*self.grid, *(name for case in self.cases for name in case.options)}


def slug(text: str) -> str:
    """A text as a part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def names() -> list[str]:
    """The experiments that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def find(source: str) -> Path:
    """The file of an experiment that was named, or given by its path.

    Raises: InputError if there is none.
    """
    if source in names():
        return CONFIGS / f"{source}.json"
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"{source} is neither an experiment ({', '.join(names())}) nor a file; the name comes "
            "first, before the options"
        )
    return path


def load(path: Path) -> dict[str, Any]:
    """The content of an experiment's file.

    Raises: InputError if it is not JSON, holds no object, or holds a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{path}: {key} stands twice in one object")
            found[key] = value
        return found

    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path} is not JSON: {error.msg}, {where}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold an object, not {content!r}")
    return content


def parse(content: dict[str, Any], name: str, path: Path | str) -> Configuration:
    """Check an experiment that trains.

    Args:
        path: of its file, for messages.
    Raises: InputError naming the file, the first key that cannot be right, and why.
    """
    known = "title about notes grid cases options where columns paper scale".split()
    reader = Reader(str(path))
    reader.known(content, known, "")
    title, about, notes = reader.texts(content)
    grid = _grid(reader, reader.object(content, "grid", required=True))
    cases = _cases(reader, reader.list(content, "cases"), grid)
    compared = [*grid, *(name for name in cases[0].keys)]
    where = tuple(
        _rule(reader, f"where[{i}]", rule, compared)
        for i, rule in enumerate(reader.list(content, "where"))
    )
    columns = tuple(reader.list(content, "columns") or ("dataset", "model"))
    for column in columns:
        if column not in compared or column == "seed":
            raise reader.error(
                "columns", f"{column!r} is nothing that runs differ in, but the seed"
            )
    paper = tuple(
        _published(reader, f"paper[{i}]", entry, compared)
        for i, entry in enumerate(reader.list(content, "paper"))
    )
    configuration = Configuration(
        name=name,
        title=title,
        about=about,
        notes=notes,
        grid=grid,
        cases=cases,
        options=reader.options("options", reader.object(content, "options")),
        where=where,
        columns=columns,
        paper=paper,
        scale=reader.options("scale", reader.object(content, "scale")),
        content=content,
    )
    _check_paper(reader, configuration)
    return configuration


def combinations(grid: dict[str, list[Any]], cases: Iterable[Case]) -> list[Keys]:
    """The keys of every run, seed by seed, so that a first table has every cell."""
    others = {name: values for name, values in grid.items() if name not in AXES}
    order = ["seed", *AXES[:3], *others]
    found = []
    for values in itertools.product(*(grid[name] for name in order)):
        keys = dict(zip(order, values, strict=True))
        seed = keys.pop("seed")
        found += [{**keys, **case.keys, "seed": seed} for case in cases]
    return found


def fits(keys: Keys, wanted: Keys) -> bool:
    """Whether `keys` has all the values that are wanted."""
    return all(keys[name] == value for name, value in wanted.items())


class Reader:
    """Reads parts of a JSON object, and says which one is wrong."""

    def __init__(self, path: str) -> None:
        self.path = path

    def error(self, key: str, what: str) -> InputError:
        return InputError(f"{self.path}: {key}: {what}")

    def known(self, content: dict[str, Any], keys: list[str], where: str) -> None:
        for key in content:
            if key not in keys:
                raise self.error(where + key, f"unknown; there are {', '.join(keys)}")

    def texts(self, content: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
        """title, about and notes."""
        title, about = content.get("title"), content.get("about", "")
        if not isinstance(title, str) or not title.strip():
            raise self.error("title", "must be a text of one line")
        if not isinstance(about, str):
            raise self.error("about", f"must be a text, not {about!r}")
        notes = self.list(content, "notes")
        for i, note in enumerate(notes):
            if not isinstance(note, str):
                raise self.error(f"notes[{i}]", f"must be a text, not {note!r}")
        return title, about, tuple(notes)

    def object(self, content: dict[str, Any], key: str, required: bool = False) -> dict[str, Any]:
        value = content.get(key, None if required else {})
        if not isinstance(value, dict):
            what = "is missing" if key not in content else f"must be an object, not {value!r}"
            raise self.error(key, what)
        return value

    def list(self, content: dict[str, Any], key: str) -> list[Any]:
        value = content.get(key, [])
        if not isinstance(value, list):
            raise self.error(key, f"must be a list, not {value!r}")
        return value

    def options(self, where: str, values: dict[str, Any]) -> dict[str, Any]:
        """Options of `mocapsnet train` by their names, with values of their types."""
        return {name: self.option(f"{where}.{name}", name, value) for name, value in values.items()}

    def option(self, where: str, name: str, value: Any) -> Any:
        known = kinds()
        if name not in known:
            raise self.error(where, "no option of mocapsnet train (write - as _)")
        return of_kind(f"{self.path}: {where}", value, known[name][1])


def _grid(reader: Reader, content: dict[str, Any]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for name in AXES:
        if name not in content:
            raise reader.error(f"grid.{name}", "is missing; give a list of one value, or of more")
    for name, values in content.items():
        if not isinstance(values, list) or not values:
            raise reader.error(f"grid.{name}", f"must be a list of values, not {values!r}")
        grid[name] = [
            reader.option(f"grid.{name}[{i}]", name, value) for i, value in enumerate(values)
        ]
        _check_different(reader, f"grid.{name}", grid[name])
    return grid


def _cases(reader: Reader, content: list[Any], grid: dict[str, list[Any]]) -> tuple[Case, ...]:
    cases = []
    for i, case in enumerate(content):
        where = f"cases[{i}]"
        if not isinstance(case, dict) or not case:
            raise reader.error(where, f"must be an object of options, not {case!r}")
        values = {name: value for name, value in case.items() if name != "name"}
        options = reader.options(where, values)
        for name in options:
            if name in grid:
                raise reader.error(f"{where}.{name}", "stands in the grid as well")
        if not isinstance(case.get("name", ""), str):
            raise reader.error(f"{where}.name", f"must be a text, not {case['name']!r}")
        keys = {"case": case["name"]} if "name" in case else dict(options)
        cases.append(Case(keys, options))
    for i, found in enumerate(cases):
        if found.keys.keys() != cases[0].keys.keys():
            same = "have a name, or none, and without names the same options"
            raise reader.error(f"cases[{i}]", f"all cases must {same}")
    for i, found in enumerate(cases):
        if "case" in found.keys and not slug(found.keys["case"]):
            raise reader.error(f"cases[{i}].name", "must have letters or digits, for a folder")
    called = [slug(found.keys["case"]) if "case" in found.keys else found.keys for found in cases]
    _check_different(reader, "cases", called)
    return tuple(cases) or (Case({}, {}),)


def _check_different(reader: Reader, where: str, values: list[Any]) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise reader.error(f"{where}[{i}]", f"{value!r} stands there twice")


def _rule(reader: Reader, where: str, content: Any, compared: list[str]) -> Rule:
    if not isinstance(content, dict) or content.keys() != {"if", "then"}:
        raise reader.error(where, f'must be {{"if": {{...}}, "then": {{...}}}}, not {content!r}')
    when = _keys(reader, f"{where}.if", reader.object(content, "if"), compared)
    return Rule(when, reader.options(f"{where}.then", reader.object(content, "then")))


def _keys(reader: Reader, where: str, content: dict[str, Any], compared: list[str]) -> Keys:
    for name in content:
        if name not in compared:
            raise reader.error(f"{where}.{name}", f"must be one of {', '.join(compared)}")
    return {
        name: value if name == "case" else reader.option(f"{where}.{name}", name, value)
        for name, value in content.items()
    }


def _published(reader: Reader, where: str, content: Any, compared: list[str]) -> Published:
    if not isinstance(content, dict):
        raise reader.error(where, f"must be an object, not {content!r}")
    numbers: list[float | None] = []
    for name in ("accuracy", "deviation"):
        value = content.get(name)
        if type(value) not in (int, float) and (name == "accuracy" or value is not None):
            raise reader.error(f"{where}.{name}", f"must be a number, not {value!r}")
        numbers.append(value)
    accuracy, deviation = numbers
    assert accuracy is not None
    shown = content.get("shown")
    if shown is not None and not isinstance(shown, str):
        raise reader.error(f"{where}.shown", f"must be a text, not {shown!r}")
    rest = {k: v for k, v in content.items() if k not in ("accuracy", "deviation", "shown")}
    if "seed" in rest:
        raise reader.error(f"{where}.seed", "the paper's numbers are means over seeds")
    return Published(_keys(reader, where, rest, compared), accuracy, deviation, shown)


def _check_paper(reader: Reader, configuration: Configuration) -> None:
    cells = combinations({**configuration.grid, "seed": [0]}, configuration.cases)
    matches: Callable[[Keys], list[int]] = lambda keys: [  # noqa: E731
        i for i, entry in enumerate(configuration.paper) if fits(keys, entry.keys)
    ]
    used = set()
    for keys in cells:
        found = matches(keys)
        if len(found) > 1:
            raise reader.error(f"paper[{found[1]}]", f"is for the cells of paper[{found[0]}] too")
        used.update(found)
    for i in range(len(configuration.paper)):
        if i not in used:
            raise reader.error(f"paper[{i}]", "is for none of the runs")
