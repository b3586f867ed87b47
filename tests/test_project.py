"""The project's own files: every package that an install brings in is pinned."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def pins() -> dict[str, str]:
    """Name to version, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rows = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in rows}


def declared() -> list[Requirement]:
    """What pyproject.toml asks for by default and with the extras `dev` and `eval`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(r) for r in project["dependencies"] + extras["dev"] + extras["eval"]]


def needs(requirement: Requirement) -> Iterator[Requirement]:
    """What the installed package asks for in turn; nothing where it is not installed."""
    try:
        rows = requires(requirement.name) or []
    except PackageNotFoundError:
        return
    for needed in map(Requirement, rows):
        extras = requirement.extras or {""}
        if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
            yield needed


def closure(requirements: Iterable[Requirement]) -> list[Requirement]:
    """The requirements and all that they need, each package and set of extras once."""
    todo, seen, found = list(requirements), set[str](), []
    while todo:
        requirement = todo.pop()
        key = f"{canonicalize_name(requirement.name)}{sorted(requirement.extras)}"
        if key not in seen:
            seen.add(key)
            todo += needs(requirement)
            found.append(requirement)
    return found


def test_a_pin_allows_what_pyproject_asks_for() -> None:
    versions = pins()
    refused = [r for r in declared() if not r.specifier.contains(versions[r.name.lower()])]
    assert refused == []


def test_every_package_of_an_install_is_pinned() -> None:
    names = {canonicalize_name(requirement.name) for requirement in closure(declared())}
    nvidia = {name for name in names if name.startswith("nvidia-")}  # torch pins them itself
    assert len(names) > 30
    assert sorted(names - nvidia - set(pins())) == []
