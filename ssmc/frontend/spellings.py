"""One spelling for each operation: torch's functions, methods and aliases to the dialect's.

A rule is a function with the signature of what it rewrites; Python binds positional, keyword
and default arguments for it. It gives the call to record, or a value where nothing needs to be
recorded: `x.to(x.dtype)` is `x`. Tensors among its arguments are proxies.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ssmc.errors import UnsupportedError

Rule = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """A call of the operator that the dialect knows under `name`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


RULES: dict[Any, Rule] = {}
_BINARY: dict[str, tuple[Any, ...]] = {
    "add": (operator.add, operator.iadd, torch.add),
    "sub": (operator.sub, operator.isub, torch.sub, torch.subtract, "subtract"),
    "mul": (operator.mul, operator.imul, torch.mul, torch.multiply, "multiply"),
    "truediv": (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div"),
    "floordiv": (operator.floordiv, torch.floor_divide, "floor_divide"),
    "pow": (operator.pow, torch.pow),
    "matmul": (operator.matmul, torch.matmul, torch.bmm, torch.mm, "bmm", "mm"),
}
_UNARY: dict[str, tuple[Any, ...]] = {
    "abs": (operator.abs, torch.abs),
    "cos": (torch.cos,),
    "exp": (torch.exp,),
    "log": (torch.log,),
    "neg": (operator.neg, torch.neg, torch.negative),
    "rsqrt": (torch.rsqrt,),
    "sigmoid": (torch.sigmoid, F.sigmoid),
    "sin": (torch.sin,),
    "sqrt": (torch.sqrt,),
    "tanh": (torch.tanh, F.tanh),
}
_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int": torch.int32,
    "long": torch.int64,
}
_IDENTITIES = ("contiguous", "clone", "detach", "cpu", "cuda", torch.clone, torch.detach)
_QUERIES = ("dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size")


def rewrites(*targets: Any) -> Callable[[Rule], Rule]:
    """The decorated rule stands for these functions and methods."""

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return add


def _binary(name: str) -> Rule:
    def rule(x: Any, other: Any, *, alpha: float = 1, rounding_mode: str | None = None) -> Call:
        if alpha != 1 or rounding_mode is not None:
            raise UnsupportedError(f"'{name}' with alpha or rounding_mode is not in the dialect")
        return Call(name, (x, other))

    return rule


def _unary(name: str) -> Rule:
    return lambda x: Call(name, (x,))


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    return x if dtype in (None, x.dtype) else Call("to_dtype", (x, dtype))


def _cast_to(dtype: torch.dtype) -> Rule:
    return lambda x: _cast(x, dtype)


def _query(name: str) -> Rule:
    return lambda x, *args: getattr(x.val, name)(*args)


for _name, _targets in _BINARY.items():
    rewrites(_name, *_targets)(_binary(_name))
for _name, _targets in _UNARY.items():
    rewrites(_name, *_targets)(_unary(_name))
for _name, _dtype in _CASTS.items():
    rewrites(_name)(_cast_to(_dtype))
for _name in _QUERIES:
    rewrites(_name)(_query(_name))
rewrites(*_IDENTITIES)(lambda x, *_, **__: x)
rewrites(torch.is_floating_point)(_query("is_floating_point"))
rewrites(torch.square, "square")(lambda x: Call("pow", (x, 2)))
rewrites(torch.reciprocal, "reciprocal")(lambda x: Call("truediv", (1, x)))
rewrites(torch.rsub, "rsub")(lambda x, y: Call("sub", (y, x)))
rewrites("type_as")(lambda x, other: _cast(x, other.dtype))
rewrites("view_as", "reshape_as")(lambda x, other: Call("reshape", (x, other.shape)))
rewrites(torch.t, "t")(lambda x: Call("transpose", (x, 0, 1)))


@rewrites("to", "type")
def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    given = [*args, *kwargs.values()]
    dtypes = [a if isinstance(a, torch.dtype) else getattr(a, "dtype", None) for a in given]
    return _cast(x, next((dtype for dtype in dtypes if dtype is not None), None))


@rewrites(F.dropout, torch.dropout)
def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p:
        raise UnsupportedError("dropout that is active outside training")
    return x


@rewrites("view", "reshape", torch.reshape)
def _reshape(x: Any, *shape: Any) -> Call:
    return Call("reshape", (x, _sequence(shape)))


@rewrites("permute", torch.permute)
def _permute(x: Any, *dims: Any) -> Call:
    return Call("permute", (x, _sequence(dims)))


@rewrites("flip", torch.flip)
def _flip(x: Any, *dims: Any) -> Call:
    return Call("flip", (x, _sequence(dims)))


@rewrites("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes)
def _transpose(x: Any, dim0: int, dim1: int) -> Call:
    return Call("transpose", (x, dim0, dim1))


@rewrites("flatten", torch.flatten)
def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Call:
    return Call("flatten", (x, start_dim, end_dim))


@rewrites("unflatten", torch.unflatten)
def _unflatten(x: Any, dim: int, sizes: Sequence[Any]) -> Call:
    return Call("unflatten", (x, dim, tuple(sizes)))


@rewrites("squeeze", torch.squeeze)
def _squeeze(x: Any, dim: int) -> Any:
    return Call("squeeze", (x, dim)) if x.val.shape[dim] == 1 else x


@rewrites("unsqueeze", torch.unsqueeze)
def _unsqueeze(x: Any, dim: int) -> Call:
    return Call("unsqueeze", (x, dim))


@rewrites(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Sequence[Any], dim: int = 0) -> Call:
    return Call("cat", (list(tensors), dim))


@rewrites(F.pad)
def _pad(x: Any, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> Call:
    if mode != "constant":
        raise UnsupportedError(
            f"padding with mode '{mode}'", hint="zeros, or a number, can be padded"
        )
    return Call("pad", (x, tuple(pad)), {} if value in (None, 0) else {"value": value})


@rewrites(torch.stack)
def _stack(tensors: Sequence[Any], dim: int = 0) -> Call:
    return Call("stack", (list(tensors), dim))


@rewrites("split", "split_with_sizes", torch.split, torch.split_with_sizes)
def _split(x: Any, split_size_or_sections: Any, dim: int = 0) -> Call:
    """Always by a list of sizes."""
    if not isinstance(split_size_or_sections, int):
        return Call("split", (x, list(split_size_or_sections), dim))
    extent = _static(x.shape[dim])
    starts = range(0, extent, split_size_or_sections)
    sizes = [min(split_size_or_sections, extent - start) for start in starts]
    return Call("split", (x, sizes, dim))


@rewrites("chunk", torch.chunk)
def _chunk(x: Any, chunks: int, dim: int = 0) -> Call:
    return _split(x, math.ceil(_static(x.shape[dim]) / chunks), dim)


@rewrites("mean", torch.mean)
def _mean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Call:
    return _reduce("mean", x, dim, keepdim, dtype)


@rewrites("sum", torch.sum)
def _sum(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Call:
    return _reduce("sum", x, dim, keepdim, dtype)


def _reduce(name: str, x: Any, dim: Any, keepdim: bool, dtype: Any) -> Call:
    if dtype not in (None, x.dtype):
        raise UnsupportedError(f"'{name}' to another dtype; cast its input instead")
    return Call(name, (x, dim, keepdim))


@rewrites("softmax", torch.softmax, F.softmax)
def _softmax(x: Any, dim: int, dtype: Any = None, _stacklevel: int = 3) -> Call:
    if dtype not in (None, x.dtype):
        raise UnsupportedError("'softmax' in another dtype; cast its input instead")
    return Call("softmax", (x, dim))


@rewrites("clamp", "clip", torch.clamp, torch.clip)
def _clamp(x: Any, min: Any = None, max: Any = None) -> Call:
    return Call("clamp", (x, min, max))


@rewrites(F.linear)
def _linear(x: Any, weight: Any, bias: Any = None) -> Call:
    return Call("ssmc::linear", (x, weight, bias, False))


@rewrites(F.embedding)
def _embedding(ids: Any, weight: Any, padding_idx: int | None = None, *options: Any) -> Call:
    if any(options[:1]):
        raise UnsupportedError("an embedding that renormalises its weight")
    return Call("ssmc::embedding", (ids, weight))


@rewrites(F.rms_norm, torch.rms_norm)
def _rms_norm(x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: Any = None) -> Call:
    _check_normalized(normalized_shape)
    return Call("ssmc::rms_norm", (x, weight, torch.finfo(x.dtype).eps if eps is None else eps))


@rewrites(F.layer_norm)
def _layer_norm(
    x: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Call:
    _check_normalized(normalized_shape)
    return Call("ssmc::layer_norm", (x, weight, bias, eps))


def _check_normalized(shape: Sequence[int]) -> None:
    if len(shape) != 1:
        raise UnsupportedError("a norm over more than the last dimension")


@rewrites(F.silu)
def _silu(x: Any, inplace: bool = False) -> Call:
    return _activation("silu", x, inplace)


@rewrites(F.gelu)
def _gelu(x: Any, approximate: str = "none") -> Call:
    return Call("gelu", (x,), {} if approximate == "none" else {"approximate": approximate})


@rewrites(F.relu, torch.relu, "relu")
def _relu(x: Any, inplace: bool = False) -> Call:
    return _activation("relu", x, inplace)


def _activation(name: str, x: Any, inplace: bool) -> Call:
    if inplace:
        raise UnsupportedError(f"'{name}' in place; a graph has no in-place operators")
    return Call(name, (x,))


@rewrites(operator.getitem)
def _getitem(x: Any, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    return x if all(_is_full(part) for part in parts) else Call("getitem", (x, index))


def _is_full(part: Any) -> bool:
    if not isinstance(part, slice):
        return part is Ellipsis
    return _is(part.start, 0) and part.stop is None and _is(part.step, 1)


def _is(value: Any, default: int) -> bool:
    return value is None or (isinstance(value, int) and value == default)


@rewrites(operator.eq)
def _eq(x: Any, y: Any) -> bool:
    return _same_extent(x, y)


@rewrites(operator.ne)
def _ne(x: Any, y: Any) -> bool:
    return not _same_extent(x, y)


def _same_extent(x: Any, y: Any) -> bool:
    """Two dynamic extents compare by what they stand for; with a number the answer is unknown."""
    values = [getattr(side, "val", None) for side in (x, y)]
    if all(isinstance(value, int) for value in values):
        return values[0] == values[1]
    return False if x is None or y is None else _undecided(x, y)


@rewrites(operator.lt, operator.le, operator.gt, operator.ge)
def _undecided(*_: Any) -> Any:
    raise UnsupportedError(
        "a comparison whose outcome depends on the batch size, the length or a tensor's values",
        hint="one graph serves all of them: compute the same for every extent",
    )


def _static(extent: Any) -> int:
    if isinstance(extent, int):
        return extent
    raise UnsupportedError(
        "the batch or the length is split into a number of parts",
        hint="its extent is not known when the model is traced",
    )


def _sequence(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Varargs `(2, 3)` and one sequence `((2, 3),)` to one form."""
    if len(values) == 1 and isinstance(values[0], list | tuple):
        return tuple(values[0])
    return values
