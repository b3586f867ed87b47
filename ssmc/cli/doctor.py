"""`ssmc doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Annotated, Any

import typer

from ssmc.cli import output

REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "networkx",
    "pydantic",
    "rich",
    "typer",
)
OPTIONAL = {
    "triton": "cuda",
    "mamba-ssm": "baseline",
    "causal-conv1d": "baseline",
    "lm-eval": "eval",
    "matplotlib": "bench",
}  # fmt: skip


def run(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what is installed, what is missing, and the command that installs it."""
    import torch

    rows = [_package(name, None) for name in REQUIRED]
    rows += [_package(name, extra) for name, extra in OPTIONAL.items()]
    devices = ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
    threads = torch.get_num_threads()
    if as_json:
        return output.say_json(
            {
                "python": platform.python_version(),
                "packages": rows,
                "devices": devices,
                "threads": threads,
            }
        )
    output.say(
        f"python {platform.python_version()}   devices {', '.join(devices)}   threads {threads}\n"
    )
    table = [(r["package"], r["version"] or "missing", r["install"] or "") for r in rows]
    output.say_table(["package", "version", "to install"], table)


def _package(name: str, extra: str | None) -> dict[str, Any]:
    try:
        version: str | None = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    missing = f"pip install 'ssmc[{extra}]'" if extra else "pip install --force-reinstall ssmc"
    return {"package": name, "version": version, "install": None if version else missing}
