"""The format `pt2`: a program of torch.export, read by `torch.export.load` and run by torch."""

from __future__ import annotations

from pathlib import Path

import torch

from ssmc.export import Exported
from ssmc.export.program import FOLDER, MODEL, Sink, export_graph, portable_graph, write_description
from ssmc.runtime import Artefact
from ssmc.runtime.artefact import whole_folder


def export(artefact: Artefact, out: Path, *, force: bool = False) -> Exported:
    """Write the program, with its description, to the folder `out`, whole or not at all.

    Raises UsageError for what torch.export cannot express, and where `out` is taken.
    """
    g = portable_graph(artefact)
    with whole_folder(out, FOLDER, force=force) as folder:
        exported = export_graph(g)
        exported.example_inputs = None  # torch would write them as a pickle
        with Sink(folder / MODEL) as file:
            torch.export.save(exported, file)
        write_description(artefact, g, "pt2", folder)
    return Exported(out)
