"""What the site has beside docs/: the README as its start, the catalogue of passes, own links.

MkDocs calls the functions named `on_...`; mkdocs.yml names this file.
"""

from __future__ import annotations

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
    """Every pass of ssmc by stage, as `ssmc passes` has it."""
    from ssmc.catalogue import builtin_passes
    from ssmc.cli.passes import describe
    from ssmc.core import find_pass

    rows = [describe(find_pass(name)) for name in sorted(builtin_passes())]
    lines = [
        "# Passes\n",
        "`ssmc passes` lists them, with those of installed packages, and `ssmc passes NAME` prints "
        "what stands here. What a pass needs is added where it is not named. "
        "[Write your own](write-your-own-pass.md).\n",
    ]
    for stage, purpose in STAGES.items():
        lines += [f"## {stage.capitalize()}\n", f"These passes {purpose}.\n"]
        lines += [line for row in rows if row["stage"] == stage for line in described(row)]
    return "\n".join(lines)


def described(row: dict[str, Any]) -> list[str]:
    """The section of a pass."""
    from ssmc.cli.passes import text

    options = [
        f"| `{name}` | `{option['type']}` | `{text(option['default'])}` |".replace(
            " | None", " or none"
        )
        for name, option in row["options"].items()
    ]
    exact = "not limited" if row["exact_to"] is None else f"{row['exact_to']:.0e}"
    needs = ", ".join(f"`{name}`" for name in row["needs"]) or "nothing"
    return [
        f"### {row['name']}\n",
        _marked(row["doc"]),
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
