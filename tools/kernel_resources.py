"""What kernels are compiled to for a Hopper GPU, on any machine: no GPU is needed.

    python tools/kernel_resources.py [--only PATTERN] [--sass FOLDER]

Compiles each case of `tools/kernel_cases` with its own launch parameters and prints, for each
kernel that it launches, registers a thread, bytes of stack (registers that did not suffice) and of
shared memory, and how many instructions it has of which kind. A kernel that does not compile is
reported, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from bench_kernels import families, family_cases
from kernel_cases.case import Case
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(multi_processor_count=132, max_shared_mem=232_448, warpSize=32)
SHOWN = 8  # kinds of instructions
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would be loaded: its name, machine code and bytes of shared memory."""

    name: str
    cubin: bytes
    shared: int


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes of stack a thread, and the instructions by kind."""

    registers: int
    stack: int
    instructions: Counter[str]
    sass: str


class AbsentGpu:
    """In place of Triton's driver: kernels are compiled, kept, and never run."""

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: vars(PROPERTIES)
        )

    def _load(self, name: str, cubin: bytes, shared: int, *_: Any) -> tuple[int, ...]:
        self.compiled.append(Compiled(name, cubin, shared))
        return (0, 0, 0, 0, 1024)  # module, function, registers, spills, threads

    def launcher_cls(self, *_: Any) -> Any:
        """What launches a kernel: nothing happens."""
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        """The GPU that code is made for."""
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """The only one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where operands are."""
        return torch.device("cpu")


@contextlib.contextmanager
def absent_gpu() -> Iterator[AbsentGpu]:
    """Triton, and ssmc, find a GPU of compute capability 9 inside."""
    gpu = AbsentGpu()
    found = {"get_device_capability": CAPABILITY, "get_device_properties": PROPERTIES}
    with contextlib.ExitStack() as patches:
        active = property(lambda _: gpu)
        patches.enter_context(mock.patch.object(type(driver), "active", active))
        for name, value in found.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        yield gpu


def compile_case(case: Case) -> list[Compiled]:
    """The kernels that a case launches, each once."""
    with absent_gpu() as gpu:
        case.kernel(*case.inputs(torch.device("cpu")))
    return gpu.compiled


def resources(kernel: Compiled) -> Resources:
    """What its machine code takes; by the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = (int(n) for n in found.groups()) if found else (0, 0)
    return Resources(registers, stack, Counter(_opcodes(sass)), sass)


def _run(tool: str, *arguments: str) -> str:
    ran = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return ran.stdout


def _opcodes(sass: str) -> list[str]:
    """The kind of each instruction, without its predicate and modifiers."""
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, re.M)


def line(kernel: Compiled, used: Resources) -> str:
    """A line of figures, and the kinds of instructions that are most."""
    most = " ".join(f"{n} {count}" for n, count in used.instructions.most_common(SHOWN))
    total = sum(used.instructions.values())
    figures = f"{used.registers:>4} registers {used.stack:>4} stack {kernel.shared:>7} shared"
    return f"    {kernel.name:24.24} {figures} {total:>6} instructions: {most}"


def report(case: Case, folder: Path | None) -> bool:
    """Print a case; False where it does not compile."""
    print(case.name, flush=True)
    try:
        kernels = compile_case(case)
    except Exception as error:  # whatever a compiler raises is that case's result
        print(textwrap.indent(f"FAILED {type(error).__name__}: {error.__cause__ or error}", "    "))
        return False
    for number, kernel in enumerate(kernels):
        used = resources(kernel)
        print(line(kernel, used))
        if folder is not None:
            name = re.sub(r"\W+", "-", f"{case.name} {number} {kernel.name}")
            (folder / f"{name}.sass").write_text(used.sass)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a kernel does not compile."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases whose family/name has this in it; * ok")
    parser.add_argument("--sass", type=Path, help="write the disassembly to this folder")
    options = parser.parse_args(arguments)
    if options.sass is not None:
        options.sass.mkdir(parents=True, exist_ok=True)
    cases = [
        case
        for family in families()
        for case in family_cases(family)
        if fnmatch.fnmatch(f"{family}/{case.name}", f"*{options.only}*")
    ]
    failed = [case for case in cases if not report(case, options.sass)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
