"""Object files with kernels, put into this process by LLVM's linker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import llvmlite.binding as llvm

from ssmc.errors import DeviceError


class Code:
    """Compiled functions by the names of their symbols."""

    def __init__(self, objects: Iterable[bytes]) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        empty = llvm.parse_assembly(f'target triple = "{machine.triple}"')
        self._engine = llvm.create_mcjit_compiler(empty, machine)
        self._files = [llvm.ObjectFileRef.from_data(data) for data in objects]
        for file in self._files:
            self._engine.add_object_file(file)
        self._engine.finalize_object()

    def address(self, symbol: str) -> int:
        """Where a function is."""
        return int(self._engine.get_function_address(symbol))


def processor() -> dict[str, object]:
    """What code that was compiled here needs of a processor."""
    features: Mapping[str, bool] = llvm.get_host_cpu_features()
    return {
        "triple": llvm.get_default_triple(),
        "name": llvm.get_host_cpu_name(),
        "features": sorted(name for name, there in features.items() if there),
    }


def check_processor(name: str, triple: str, features: Sequence[str]) -> None:
    """Raise DeviceError where this processor does not run code that was compiled for another."""
    here = processor()
    missing = sorted(set(features) - set(here["features"]))  # type: ignore[call-overload]
    if triple != here["triple"] or missing:
        what = f"this one has no {', '.join(missing)}" if missing else f"this is {here['triple']}"
        raise DeviceError(
            f"the program was compiled for another processor, {name} of {triple}: {what}",
            hint="export the artefact again on this machine",
        )
