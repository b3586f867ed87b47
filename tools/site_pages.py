"""What the site has beside docs/: the README as its start, the catalogue of passes, own links.

MkDocs calls the functions named `on_...`; mkdocs.yml names this file.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
STAGES = {
    "analyse": "say where the scans, projections and norms are, and change nothing",
    "rewrite": "change weights and calls, and leave the result as it is up to rounding",
    "reconstruct": "train parameters, to make up for what is to be rounded",
    "calibrate": "watch activations on text",
    "quantise": "round",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of something else."""
    from mkdocs.structure.files import File

    readme = (config_root(config) / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    files.append(File.generated(config, "passes.md", content=catalogue()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Name what a link leads to outside the site, in place of a link that leads nowhere."""

    def replaced(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if files.get_file_from_path(target) is not None:
            return found[0]
        return text if text.strip("`") in target else f"{text} (`{target.removeprefix('../')}`)"

    return LINK.sub(replaced, markdown)


def config_root(config: Any) -> Path:
    """The folder of mkdocs.yml."""
    return Path(config.config_file_path).parent


def catalogue() -> str:
    """Every pass of ssmc by stage: its docstring, options, and what it needs."""
    from ssmc.core import find_pass, known_passes
    from ssmc.core.passes import origin

    passes = [find_pass(name) for name in known_passes() if origin(name) == "ssmc"]
    lines = [
        "# Passes\n",
        "`ssmc passes` lists them, with those of installed packages, and `ssmc passes NAME` prints "
        "what stands here. What a pass needs is added where it is not named. "
        "[Write your own](write-your-own-pass.md).\n",
    ]
    for stage, purpose in STAGES.items():
        found = [cls for cls in passes if cls.stage == stage]
        lines += [f"## {stage.capitalize()}\n", f"These passes {purpose}.\n"]
        lines += [line for cls in found for line in described(cls)]
    return "\n".join(lines)


def described(cls: Any) -> list[str]:
    """The section of a pass."""
    doc = inspect.getdoc(cls) or ""
    options = [
        f"| `{f.name}` | `{getattr(f.type, '__name__', f.type)}` | `{_text(f.default)}` |".replace(
            " | None", " or none"
        )
        for f in dataclasses.fields(cls)
    ]
    exact = "not limited" if cls.exact_to is None else f"{cls.exact_to:.0e}"
    needs = ", ".join(f"`{name}`" for name in cls.needs) or "nothing"
    return [
        f"### {cls.name}\n",
        _marked(doc),
        f"\nNeeds {needs}; relative error it may add on the probe: {exact}.\n",
        *(["| option | type | default |", "| --- | --- | --- |", *options, ""] if options else []),
    ]


def _marked(doc: str) -> str:
    """A docstring as Markdown: `Replaces:` and `With:` and what is below them as a block."""
    parts = []
    for paragraph in doc.split("\n\n"):
        is_block = paragraph.startswith(("Replaces:", "With:"))
        parts.append(f"```text\n{paragraph}\n```" if is_block else paragraph)
    return "\n\n".join(parts)


def _text(value: Any) -> str:
    return str(value).lower() if value in (True, False, None) else str(value)
