"""`ssmc doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ssmc.cli import output

GPU = "a CUDA device"


@dataclass(frozen=True)
class Feature:
    """What ssmc can do with the packages of an extra (None: those it always has)."""

    name: str
    command: str
    extra: str | None = None
    needs_gpu: bool = False
    pip: str = "pip install"

    def install(self) -> str:
        """The command that brings its packages."""
        return f"{self.pip} 'ssmc[{self.extra}]'" if self.extra else f"{self.pip} --upgrade ssmc"


FEATURES = (
    Feature("compile, look at and run models", "ssmc compile, inspect, eval, generate"),
    Feature("run on a GPU, on Triton kernels", "--device cuda", "cuda", needs_gpu=True),
    Feature("score tasks of lm-eval", "ssmc eval --tasks, lm_eval --model ssmc", "eval"),
    Feature("draw reports and plots", "ssmc compile --report, ssmc bench --plot", "bench"),
    Feature("load what --format compressed-tensors writes", "ssmc export", "export"),
    Feature("write a file for llama.cpp", "ssmc export --format gguf", "gguf"),
    Feature("build the documentation", "make docs", "docs"),
    Feature(
        "compare with mamba-ssm", "ssmc bench --baseline mamba-ssm", "baseline", needs_gpu=True,
        pip="pip install --no-build-isolation",
    ),
)  # fmt: skip


def run(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what works here, what is missing for the rest, and the command that installs it."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    threads = torch.get_num_threads()
    packages = [p for feature in FEATURES for p in _packages(feature)]
    features = [_state(feature, packages, bool(gpus)) for feature in FEATURES]
    if as_json:
        found = {"python": platform.python_version(), "devices": ["cpu", *gpus], "threads": threads}
        return output.say_json(found | {"features": features, "packages": packages})
    devices = ", ".join(["cpu", *gpus])
    output.say(f"python {platform.python_version()}   devices {devices}   threads {threads}\n")
    able = [(f["feature"], f["command"], ", ".join(f["missing"])) for f in features]
    output.say_table(["to", "use", "missing"], able)
    output.say("")
    rows = [(p["package"], p["version"] or "missing", p["wanted"], p["install"]) for p in packages]
    output.say_table(["package", "version", "wanted", "to install"], rows)


def _packages(feature: Feature) -> list[dict[str, Any]]:
    """The packages that a feature adds, as ssmc's metadata has them, with what is installed."""
    from packaging.requirements import Requirement

    from ssmc.errors import UsageError

    def asks(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    try:
        rows = [Requirement(row) for row in importlib.metadata.requires("ssmc") or ()]
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            "ssmc runs from a folder and is not installed, so what it needs is not known",
            hint="pip install -e . in that folder",
        ) from None
    if feature.extra is None:
        return [_package(r, feature) for r in rows if asks(r, "")]
    return [_package(r, feature) for r in rows if asks(r, feature.extra) and not asks(r, "")]


def _package(requirement: Any, feature: Feature) -> dict[str, Any]:
    try:
        version: str | None = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    fits = version is not None and requirement.specifier.contains(version, prereleases=True)
    return {
        "package": requirement.name,
        "version": version,
        "wanted": str(requirement.specifier),
        "extra": feature.extra,
        "install": None if fits else feature.install(),
    }


def _state(feature: Feature, packages: list[dict[str, Any]], gpu: bool) -> dict[str, Any]:
    """A feature with what it lacks: packages, those that everything needs among them, a device."""
    mine = [p for p in packages if p["extra"] in (None, feature.extra) and p["install"]]
    missing = [f"{p['package']}{p['wanted']}" for p in mine]
    return {
        "feature": feature.name,
        "command": feature.command,
        "missing": missing + ([GPU] if feature.needs_gpu and not gpu else []),
        "install": feature.install() if missing else None,
    }
