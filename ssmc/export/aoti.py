"""The format `aoti`: the program, compiled by AOTInductor for the processor at hand.

What Inductor compiles is all between the operators of `ssmc.ops`, which the package calls as they
are registered in the process that loads it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from torch.export import ExportedProgram

from ssmc.errors import UsageError
from ssmc.export import Exported
from ssmc.export.program import (
    FOLDER,
    MODEL,
    Sink,
    export_graph,
    portable_graph,
    reason,
    write_description,
)
from ssmc.runtime import Artefact
from ssmc.runtime.artefact import whole_folder

SETTINGS = {
    "emulate_precision_casts": True,  # what a recipe rounds to 16 bits stays rounded
    "aot_inductor.precompile_headers": False,  # pays for those who compile often
}


def export(artefact: Artefact, out: Path, *, force: bool = False) -> Exported:
    """Write the compiled package, with its description, to the folder `out`, whole or not at all.

    Raises UsageError where there is no C++ compiler, for what torch.export or Inductor cannot
    express, and where `out` is taken.
    """
    check_compiler()
    g = portable_graph(artefact)
    with whole_folder(out, FOLDER, force=force) as folder:
        exported = export_graph(g)
        with Sink(folder / MODEL) as file:
            _compile(exported, file)
        write_description(artefact, g, "aoti", folder)
    return Exported(out)


def check_compiler() -> None:
    """Raise UsageError unless torch finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(
            "there is no C++ compiler, with which AOTInductor makes a package",
            hint="install g++ or name one in the environment variable CXX; pt2 needs none",
        ) from error


def _compile(exported: ExportedProgram, file: Sink) -> None:
    from torch._inductor import aoti_compile_and_package

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own use of what it gives up
            aoti_compile_and_package(exported, package_path=file, inductor_configs=SETTINGS)
    except Exception as error:  # its own errors, the compiler's, and those of what it runs
        raise UsageError(
            f"AOTInductor cannot compile this artefact: {reason(error)}",
            hint="pt2 is the same program, not compiled",
        ) from error
