"""The progress of a compilation on disk, so that one that was killed goes on where it was.

Only what takes long is kept: what a pass has measured or chosen so far, and where it stands. All
else is done again, and gives the same, since passes are deterministic. A folder holds

    progress.json        what is compiled, and the files of each pass
    NNNNNN.safetensors   tensors, written and synced before progress.json names them
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmc.core.disk import sync
from ssmc.core.graph import Graph
from ssmc.errors import UsageError

MANIFEST = "progress.json"
SCHEMA = 1
_NUMBERED = re.compile(r"\d{6}\.safetensors$")
INTERVAL = 30.0
"""Seconds of work between two savings, at least: what a kill may cost."""


class Journal:
    """The progress of one compilation in `folder`.

    `identity` says what is compiled, and how: JSON data by topic. With `resume`, the folder may
    hold the progress of an earlier run of the same, which is taken over; UsageError naming the
    topic where it is another's, or where the folder is damaged. Without, it is emptied first.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.passes: dict[str, dict[str, Any]] = {}
        self.number = 0
        if resume and (folder / MANIFEST).is_file():
            self._take_over()
        else:
            self._check_ours()
            self.remove()
        self._sweep()

    def _check_ours(self) -> None:
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        foreign = [
            n for n in sorted(names) if not n.startswith(MANIFEST) and not _NUMBERED.match(n)
        ]
        if foreign:
            raise UsageError(
                f"{self.folder} is where progress is kept, and holds '{foreign[0]}'",
                hint="move it away, or name another output folder",
            )

    def _take_over(self) -> None:
        try:
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            self.passes, self.number = found["passes"], found["number"]
            identity = dict(found["identity"])
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None
        for topic in self.identity:
            if identity.get(topic) != self.identity[topic]:
                raise UsageError(
                    f"{self.folder} holds the progress of another {topic}: "
                    f"{_difference(identity.get(topic), self.identity[topic])}",
                    hint="leave --resume out to begin anew, or name another output folder",
                )

    def _damaged(self) -> UsageError:
        return UsageError(
            f"the progress in {self.folder} is damaged", hint="leave --resume out to begin anew"
        )

    def write(self, tensors: Mapping[str, Tensor]) -> str:
        """A new file of tensors, whole on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.number:06}.safetensors"
        self.number += 1
        save_file(_apart(tensors), self.folder / name)
        sync(self.folder / name)
        return name

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file."""
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError):
            raise self._damaged() from None

    def publish(self) -> None:
        """Let the manifest name what has been written, at once; drop what it names no more."""
        data = {
            "schema": SCHEMA,
            "identity": self.identity,
            "passes": self.passes,
            "number": self.number,
        }
        part = self.folder / f"{MANIFEST}.part"
        part.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        sync(part)
        part.replace(self.folder / MANIFEST)
        sync(self.folder)
        self._sweep()

    def _sweep(self) -> None:
        named = {name for entry in self.passes.values() for name in _files(entry)}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()

    def remove(self) -> None:
        """Delete what is kept, and the folder."""
        for path in (*self.folder.glob(f"{MANIFEST}*"), *self.folder.glob("*.safetensors")):
            path.unlink()
        if self.folder.exists():
            self.folder.rmdir()


@dataclass
class Saved:
    """Where a pass stood: its own data, and its tensors."""

    about: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Log:
    """One pass's part of a journal, under a name that is its own; without a journal, nothing."""

    def __init__(self, journal: Journal | None = None, name: str = "") -> None:
        self.journal, self.name = journal, name
        self.last = time.monotonic()
        self.known: dict[str, Tensor] = {}

    def restore(self, g: Graph) -> Saved | None:
        """Where the pass stood, with what it had put into `g` until then; None at its beginning.

        To be asked before the pass changes `g`.
        """
        entry = self.journal.passes.get(self.name) if self.journal else None
        if self.journal is not None and entry is not None:
            for file in entry["params"]:
                values = self.journal.read(file)
                for node in g.nodes:
                    if node.op == "get_attr" and node.target in values:
                        g.set_param(node, values[str(node.target)].to(g.param(node).device))
            g.matched[:], g.skipped[:] = entry["matched"], entry["skipped"]
            g.notes[:] = entry["notes"]
        self.known = g.params()
        if self.journal is None or entry is None:
            return None
        return Saved(entry["about"], self.journal.read(entry["position"]))

    def due(self) -> bool:
        """Whether so much was done since the last saving that it is worth another."""
        return self.journal is not None and time.monotonic() - self.last >= INTERVAL

    def save(self, g: Graph, saved: Saved) -> None:
        """Keep where the pass stands: `saved`, and the parameters it has changed in `g`."""
        if self.journal is None:
            return
        now = g.params()
        changed = {name: t for name, t in now.items() if self.known.get(name) is not t}
        entry = self.journal.passes.get(self.name, {"params": []})
        files = [*entry["params"], *([self.journal.write(changed)] if changed else [])]
        self.journal.passes[self.name] = {
            "params": files,
            "position": self.journal.write(saved.tensors),
            "about": saved.about,
            "matched": list(g.matched),
            "skipped": list(g.skipped),
            "notes": list(g.notes),
        }
        self.journal.publish()
        self.known, self.last = now, time.monotonic()


def _files(entry: Mapping[str, Any]) -> Iterable[str]:
    return (*entry["params"], entry["position"])


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous host tensors, none of which shares memory with another."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        whole = value.untyped_storage().nbytes() == value.nbytes
        if not whole or value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        apart[name] = value
    return apart


def _difference(old: Any, new: Any) -> str:
    """The first thing in which two JSON values differ, as `old, here new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return f"{key} {_difference(old.get(key), new.get(key))}"
    return f"{json.dumps(old)}, here {json.dumps(new)}"
