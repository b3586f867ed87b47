"""The examples as modules, and a package with an entry point put where Python finds it."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`example("word_breaks")`: that file of examples/, imported."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def install(package: Path, site: Path) -> None:
    """Put a package's modules and metadata into `site`, as an installer does, without one."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    for module in package.glob("*.py"):
        shutil.copy(module, site)
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata)
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for group, e in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def ssmc_with_pass(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`ssmc_with_pass("passes", ...)`: the command line where the example's pass is installed."""
    site = tmp_path_factory.mktemp("site")
    install(EXAMPLES / "round_a_pass", site)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from ssmc.cli.main import main; main()", *arguments]
        environment = os.environ | {"PYTHONPATH": path, "NO_COLOR": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=site
        )

    return run
