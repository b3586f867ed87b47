"""Tapes: the kernels of one call on a processor, recorded once and run again without Python.

As with a CUDA graph, ids, states and everything in between live in buffers that stay where they
are. What has no kernel is a call of plain torch between two lists of kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from ssmc.core import Graph, States
from ssmc.core.dialect import target_name
from ssmc.lowering import Form
from ssmc.runtime.capture import overwrite

VIEWS = {
    "flatten", "getitem", "permute", "reshape", "size", "split", "squeeze", "transpose",
    "unflatten", "unsqueeze",
}  # fmt: skip
"""Calls whose result, where it shares the memory of an operand, needs no call again."""


class TapeRecorder:
    """Records steps, which share their states: prompts have work enough to hide their launches."""

    forms: tuple[Form, ...] = ("step",)

    def __init__(self, states: States, device: torch.device) -> None:
        self.states, self.device = states, device

    def record(self, program: Graph, shape: tuple[int, int]) -> TapeRecording:
        """`advance` for ids of `shape` [batch, length], recorded; the states stay as they are."""
        from ssmc.kernels.cpu.elementwise import copy_into
        from ssmc.kernels.cpu.launch import Tape

        before = {name: state.clone() for name, state in self.states.items()}
        ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        with torch.no_grad(), Tape() as tape:
            runner = _Runner(program.module)
            result, new = runner.run(ids, *(self.states[s.name] for s in program.states))
            for spec, state in zip(program.states, new, strict=True):
                if state.data_ptr() != self.states[spec.name].data_ptr():
                    copy_into(self.states[spec.name], state)
        overwrite(self.states, before)
        return TapeRecording(tape, program, ids, result[:, -1])


class TapeRecording:
    """A recorded call, with what has to live as long: the program owns the weights it reads."""

    def __init__(self, tape: Any, program: Graph, ids: Tensor, logits: Tensor) -> None:
        self.tape, self.program, self.ids, self.logits = tape, program, ids, logits

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary] behind `ids`, until the next call of this length."""
        self.ids.copy_(ids)
        self.tape.run()
        return self.logits


class _Runner(fx.Interpreter):
    """Runs a lowered graph while a tape records: kernels record themselves, the rest is put on."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        from ssmc.kernels.cpu.launch import run_torch

        if str(getattr(target, "__module__", "")).startswith("ssmc.kernels.cpu"):
            return target(*args, **kwargs)
        if target_name(target) in VIEWS:
            result = target(*args, **kwargs)
            if _is_view(result, args[0]):
                return result
        return run_torch(functools.partial(target, **kwargs), *args)


def _is_view(result: Any, operand: Any) -> bool:
    if isinstance(result, Tensor) and isinstance(operand, Tensor):
        return result.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr()
    if isinstance(result, tuple | list) and isinstance(operand, Tensor):
        return all(_is_view(part, operand) for part in result)
    return True  # a number, or a member of a tuple
