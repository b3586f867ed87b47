"""A graph as plain data and back. Reading it resolves operator names and executes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ssmc.core import Graph, StateSpec, is_call
from ssmc.core.dialect import resolve, target_name
from ssmc.core.graph import infer, meta_state, put_tensor
from ssmc.errors import ArtefactError, SsmcError

SCHEMA = 1
_META = ("owner", "layer", "role")


def graph_to_json(g: Graph) -> dict[str, Any]:
    """The nodes of `g` in order, its inputs, states and the shapes and dtypes of its tensors."""
    return {
        "schema": SCHEMA,
        "inputs": [{"name": name, **tensor_spec(g.node(name).meta["val"])} for name in g.inputs],
        "states": [
            {"name": s.name, "shape": list(s.shape), "dtype": dtype_name(s.dtype)} for s in g.states
        ],
        "tensors": {name: tensor_spec(value) for name, value in g.params().items()},
        "nodes": [_node_to_json(n) for n in g.nodes if n.op == "call_function"],
        "result": _encode(g.result),
        "new_states": _encode(g.new_states),
    }


def tensor_spec(value: torch.Tensor) -> dict[str, Any]:
    """Shape and dtype of a tensor."""
    return {"shape": list(value.shape), "dtype": dtype_name(value.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_from(name: str) -> torch.dtype:
    """torch.float32 for `float32`; ArtefactError for a name that is no dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtefactError(f"'{name}' is no dtype")
    return dtype


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "target": target_name(node.target),
        "args": [_encode_index(a) if is_call(node, "getitem") else _encode(a) for a in node.args],
        "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
    } | {key: node.meta[key] for key in _META if node.meta.get(key) is not None}


def _encode_index(value: Any) -> Any:
    """As `_encode`, with slices, and tuples that stay tuples: a list of places is another index."""
    if isinstance(value, tuple):
        return {"index": [_encode_index(v) for v in value]}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    return {"ellipsis": True} if value is Ellipsis else _encode(value)


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"tensor": str(value.target)} if value.op == "get_attr" else {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArtefactError(f"an operand of type {type(value).__name__} cannot be written")


class _Reader:
    def __init__(self, data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.known: dict[str, fx.Node] = {}
        self.params: dict[str, fx.Node] = {}
        self.specs = [
            StateSpec(s["name"], tuple(s["shape"]), dtype_from(s["dtype"])) for s in data["states"]
        ]
        self.inputs = [spec["name"] for spec in data["inputs"]]
        for spec in data["inputs"]:
            shape, dtype = tuple(spec["shape"]), dtype_from(spec["dtype"])
            self._placeholder(spec["name"], torch.empty(shape, dtype=dtype, device="meta"))
        batch = data["inputs"][0]["shape"][0]
        for spec in self.specs:
            self._placeholder(spec.name, meta_state(spec, batch))
        for name, value in tensors.items():
            self._tensor(name, value)
        for row in data["nodes"]:
            self._call(row)
        self.graph.output((self.decode(data["result"]), tuple(self.decode(data["new_states"]))))

    def _placeholder(self, name: str, value: torch.Tensor) -> None:
        node = self.graph.placeholder(_plain(name))
        node.meta["val"] = value
        self.known[name] = node

    def _tensor(self, name: str, value: torch.Tensor) -> None:
        if re.search(r'["\\\x00-\x1f]', name):
            raise ArtefactError(f"{name!r} is no name for a tensor")
        put_tensor(self.root, name, value)
        node = self.graph.get_attr(name)
        node.meta.update(val=value.to("meta"), owner=name.rpartition(".")[0])
        self.params[name] = node

    def _call(self, row: dict[str, Any]) -> None:
        args = tuple(self.decode(a) for a in row["args"])
        kwargs = {_plain(key): self.decode(value) for key, value in row["kwargs"].items()}
        node = self.graph.create_node(
            "call_function", resolve(row["target"]), args, kwargs, name=_plain(row["name"])
        )
        node.meta.update({key: row.get(key) for key in _META})
        node.meta["val"] = infer(node)
        self.known[row["name"]] = node

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        kind, inside = next(iter(value.items()))
        readers: dict[str, Callable[[Any], Any]] = {
            "node": self.known.__getitem__,
            "tensor": self.params.__getitem__,
            "dtype": dtype_from,
            "float": float,
            "index": lambda parts: tuple(self.decode(part) for part in parts),
            "slice": lambda ends: slice(*(self.decode(end) for end in ends)),
            "ellipsis": lambda _: ...,
        }
        return readers[kind](inside)


def _plain(name: str) -> str:
    """`name` where it is an identifier: torch.fx writes names into source code and runs it."""
    if not name.isidentifier():
        raise ArtefactError(f"{name!r} is no name for a node")
    return name


def graph_from_json(data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Graph:
    """The graph that `data` describes, over `tensors`.

    Raises UnsupportedError for an operator outside the dialect, ArtefactError for data that does
    not describe a graph.
    """
    try:
        reader = _Reader(data, tensors)
        reader.graph.lint()
        return Graph(reader.root, reader.graph, reader.inputs, reader.specs)
    except SsmcError:
        raise
    except Exception as error:  # what torch raises for operands that do not fit is not documented
        raise ArtefactError(f"it does not describe a graph: {error!r}") from error
