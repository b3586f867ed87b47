"""What kernels are compiled to for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CASE = "norm quantize 768 2048"


def run(*arguments: str | Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own, since here kernels may be interpreted."""
    tool = [ROOT / "tools" / "kernel_resources.py"]
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else tool), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
    )


def test_registers_and_instructions(tmp_path: Path) -> None:
    ran = run("--only", f"rows/{CASE}", "--sass", tmp_path / "sass")
    assert ran.returncode == 0, ran.stderr
    name, line = ran.stdout.splitlines()
    assert name == CASE
    kernel, registers, _, stack, *_ = line.split()
    assert kernel == "_norm_kernel"
    assert 16 < int(registers) <= 255
    assert stack == "0"
    (sass,) = (tmp_path / "sass").glob("*.sass")
    # A kernel that waits for the one in front of it: it was made for compute capability 9.
    assert "ACQBULK" in sass.read_text()


def test_a_kernel_that_does_not_compile_is_reported() -> None:
    code = """
import sys
import kernel_resources
from kernel_cases.case import Case

def broken(*operands):
    raise TypeError("no such operand")

case = Case("broken", broken, broken, lambda device: (), bytes=1.0)
kernel_resources.family_cases = lambda family: (case,) if family == "rows" else ()
sys.exit(kernel_resources.main([]))
"""
    ran = run(code=code)
    assert ran.returncode == 1
    assert ran.stdout.splitlines() == ["broken", "    FAILED TypeError: no such operand"]
