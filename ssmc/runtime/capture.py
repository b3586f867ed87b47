"""CUDA graphs: the launches of one call, recorded once and replayed with a single one.

A replay runs the recorded kernels on the recorded addresses: ids, states and logits live in buffers
that stay where they are, and what a call allocates in between comes from a pool of memory that
only these graphs use.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ssmc.core import Graph, States
from ssmc.lowering import Form


class NotCapturableError(Exception):
    """A call that cannot be recorded: it waits for the GPU, say, or copies from the host."""


class Recorder:
    """Records calls that share their states, a pool of memory, and a stream to record on."""

    forms: tuple[Form, ...] = ("last", "step")

    def __init__(self, states: States, device: torch.device) -> None:
        self.states, self.device = states, device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # one for all: only so do they share memory

    def record(self, program: Graph, shape: tuple[int, int]) -> Recording:
        """`advance` for ids of `shape` [batch, length], recorded; the states stay as they are.

        Raises NotCapturableError with the reason. A call that fails in any case fails as it would
        without recording.
        """
        ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # left in any case, unlike the one torch enters below
            # Kernels are compiled and loaded in a first run: neither may happen while recording.
            advance(program, ids, {name: state.clone() for name, state in self.states.items()})
            recording = self._record(program, ids)
        torch.cuda.current_stream().wait_stream(self.stream)
        return recording

    def _record(self, program: Graph, ids: Tensor) -> Recording:
        graph = torch.cuda.CUDAGraph()
        scope = torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            with scope:
                logits = advance(program, ids, self.states)[:, -1]
        except RuntimeError as error:
            self._recover()
            raise _explained(error) from error
        return Recording(graph, program, ids, logits)

    def _recover(self) -> None:
        """Undo what torch 2.11 leaves behind a failed capture: the pool open, random numbers off.

        The pool cannot be used again. The device's generator takes itself to be recorded, and
        refuses its numbers, until a capture has ended well.
        """
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        value = torch.zeros(1, device=self.device)
        with torch.cuda.graph(
            torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"
        ):
            value.zero_()


class Recording:
    """A recorded call, with what has to live as long: the program owns the weights it reads."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, program: Graph, ids: Tensor, logits: Tensor
    ) -> None:
        self.graph, self.program, self.ids, self.logits = graph, program, ids, logits

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary] behind `ids`, until the next replay from the same pool."""
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


def advance(program: Graph, ids: Tensor, states: States) -> Tensor:
    """The logits that a program gives for `ids` [batch, length]; `states` are overwritten.

    They have room for the ids.
    """
    logits, new = program.run(ids, states=states)
    overwrite(states, new)
    return logits


def clear(states: States) -> None:
    """Make all states zero."""
    for names in _by_dtype(states):
        torch._foreach_zero_([states[n] for n in names])


def overwrite(states: States, new: States) -> None:
    """Copy into its buffer each new state that no kernel has written there already."""
    for names in _by_dtype(states):
        moved = [n for n in names if new[n].data_ptr() != states[n].data_ptr()]
        if moved:
            torch._foreach_copy_([states[n] for n in moved], [new[n] for n in moved])


def _by_dtype(states: States) -> list[list[str]]:
    """The names of the states of each dtype: what one launch can do."""
    dtypes = dict.fromkeys(state.dtype for state in states.values())
    return [[n for n, state in states.items() if state.dtype == dtype] for dtype in dtypes]


def _explained(error: RuntimeError) -> Exception:
    """What ended a recording: the error inside it rather than that of the unfinished recording."""
    inside = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    if isinstance(inside, torch.OutOfMemoryError):
        return inside
    return NotCapturableError(str(inside).partition("\n")[0])
