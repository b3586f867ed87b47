"""CUDA graphs on the CPU: a recording does nothing until it is replayed, on fixed addresses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = "operation not permitted when stream is capturing"


class EmulatedGraph:
    """The calls of a recording, run again on the tensors they were recorded with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError(f"{WAITS}\nand more lines")
        schema, kwargs = func._schema, kwargs or {}
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(t, t.clone()) for t in tensors(value)]
        result = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, tensors(result)))
        if all(r.alias_info is None for r in schema.returns):
            self.made += tensors(result)
        return result

    def undo(self) -> None:
        """As if nothing had run: what was overwritten is back, what was made holds rubbish."""
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        for tensor in self.made:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)


class EmulatedStream:
    """A stream; there is only one."""

    def wait_stream(self, other: EmulatedStream) -> None:
        """Nothing to wait for."""


@contextlib.contextmanager
def emulated_capture(graph: EmulatedGraph, **options: Any) -> Iterator[None]:
    """torch.cuda.graph: ends with an error of its own where the recording has failed."""
    recording, failed = _Recording(graph), True
    try:
        with recording:
            yield
        failed = False
    finally:
        recording.undo()
        if failed:
            raise RuntimeError("the capture is invalid")


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a value."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def emulate_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what records CUDA graphs do so on the CPU."""
    for name, value in {
        "CUDAGraph": EmulatedGraph,
        "Stream": lambda device: EmulatedStream(),
        "current_device": lambda: 0,
        "current_stream": EmulatedStream,
        "graph": emulated_capture,
        "graph_pool_handle": object,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: None, raising=False)
