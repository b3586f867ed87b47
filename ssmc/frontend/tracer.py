"""torch.fx tracing with proxies that know the shape, type and structure of what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from traceback import extract_tb
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from ssmc.core import dialect
from ssmc.core.graph import (
    BATCH,
    LENGTH,
    ROOM,
    Graph,
    infer,
    is_call,
    meta_state,
    put_tensor,
)
from ssmc.core.state import POSITION
from ssmc.errors import SsmcError, UnsupportedError
from ssmc.frontend.annotate import annotate
from ssmc.frontend.normalise import canonical, check_extents, fold_squeezes
from ssmc.frontend.program import Program, layer_of, program
from ssmc.frontend.spellings import Call

DYNAMIC = (BATCH, LENGTH, ROOM)
_LIBRARIES = tuple(
    f"{folder}/" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)


def trace(module: nn.Module, example_inputs: Sequence[Tensor] | Tensor | None = None) -> Graph:
    """The graph of `module`, which stays as it was; float32, any batch size and any length.

    A Hugging Face causal language model needs no inputs: its graph takes `input_ids` [B, L] and
    gives logits [B, L, V]. Any other module is traced for tensors like `example_inputs`, whose
    dimension 0 is the batch, and dimension 1 the length where the first input's is; it gives a
    tensor or a tuple of tensors. States are those of the module's adapters: `l{layer}_conv`
    [K-1, C] and `l{layer}_ssm`, [D, N] in Mamba-1, [H, P, N] in Mamba-2; with attention
    `l{layer}_k` and `l{layer}_v` [room, G, P], and once `position` [].

    Parameters keep their names, and may be on the meta device. Raises UnsupportedError, naming
    module and source line, for what the dialect does not cover; UsageError for wrong inputs.
    """
    tracer = Tracer(program(module, example_inputs))
    recorded = tracer.record()
    fold_squeezes(recorded, tracer.tensors)
    recorded.eliminate_dead_code()
    check_extents(recorded)
    root = nn.Module()
    for name, tensor in tracer.tensors.items():
        put_tensor(root, name, tensor)
    # A graph knows the class of its tracer, which copies of it would try to make.
    graph = fx.Graph()
    graph.output(graph.graph_copy(recorded, {}))
    placeholders = [node.name for node in graph.find_nodes(op="placeholder")]
    inputs = placeholders[: len(tracer.program.inputs)]
    return annotate(Graph(root, graph, inputs, tracer.program.states))


class MetaProxy(fx.Proxy):
    """A proxy that answers from its node's meta value, as far as no dynamic extent is in it.

    Static extents are ints, dynamic ones proxies of `size` nodes.
    """

    tracer: Tracer

    @property
    def val(self) -> Any:
        """The meta tensor, tuple of them, or extent that the proxy stands for."""
        return self.node.meta["val"]

    @property
    def shape(self) -> tuple[Any, ...]:
        """The extents, ints and proxies."""
        return tuple(self.tracer.extent(self, dim) for dim in range(self.val.ndim))

    def size(self, dim: int | None = None) -> Any:
        """As torch.Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def T(self) -> Any:
        """The transpose of a matrix."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> Any:
        """The transpose of the last two dimensions."""
        return self.transpose(-2, -1)

    @property
    def data(self) -> MetaProxy:
        """The tensor itself: gradients play no part in a graph."""
        return self

    def __getattr__(self, k: str) -> Any:
        value = getattr(self.val, k)
        return Attribute(self, k) if callable(value) else value

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.val, tuple | list):
            chosen = range(len(self.val))[index]
            if isinstance(chosen, range):
                return tuple(self[i] for i in chosen)
            index = chosen
        return self.tracer.create_proxy(
            "call_function", dialect.resolve("getitem"), (self, index), {}
        )

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        length = len(self.val)
        if isinstance(self.val, Tensor) and length in DYNAMIC:
            self._as_number()
        return length

    def __bool__(self) -> bool:
        return bool(self.val) if isinstance(self.val, tuple | list) else self._as_number()

    def _as_number(self) -> NoReturn:
        raise UnsupportedError(
            "the code needs the batch size, the length or a tensor's values as a number",
            hint="one graph serves all of them: compute the same for every extent",
        )

    __index__ = __int__ = __float__ = _as_number

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise UnsupportedError("an assignment into a tensor; a graph has no in-place operators")


class Tracer(fx.Tracer):
    """Records a program's operations in the dialect, with their values, owners and layers.

    `tensors` holds the parameters, buffers and constants recorded, by name: the names of the
    module, the first of several for tied ones; floating point as float32.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.tensors: dict[str, Tensor] = {}
        self.failed_in: str | None = None
        module = program.module
        named = [*_plain_tensors(module), *module.named_buffers(), *module.named_parameters()]
        self._names = {id(tensor): name for name, tensor in named}
        self._constants: list[Tensor] = []  # kept alive, for their ids are their names' keys
        self._paths = {child: path for path, child in module.named_modules()}
        self._layers: dict[str, int | None] = {}
        self._proxies: dict[Any, MetaProxy] = {}

    def record(self) -> fx.Graph:
        """The program's graph; UnsupportedError, saying where, if it cannot be traced."""

        def forward() -> None: ...  # the inputs and what is called come from create_args_for_root

        try:
            with torch.no_grad():
                return self.trace(forward)
        except Exception as error:
            raise self._located(error) from error

    def _located(self, error: Exception) -> UnsupportedError:
        path = self.failed_in or ""
        where = type(self.program.module.get_submodule(path)).__name__
        where += f" at '{path}'" if path else ""
        frames = [
            f for f in extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)
        ]
        where += f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        what = str(error) if isinstance(error, SsmcError) else f"{type(error).__name__}: {error}"
        hint = getattr(error, "hint", None) or "check that the module runs on such inputs"
        return UnsupportedError(f"cannot trace {where}: {what}", hint=hint)

    # -- what torch.fx asks for ---------------------------------------------------------------

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[MetaProxy]]:
        """The program and its placeholders: inputs, then states."""
        specs = self.program.states
        states = {spec.name: meta_state(spec) for spec in specs}
        owners = {
            name: site.path
            for site in self.program.sites
            for name in site.states.values()
            if name != POSITION
        }
        return self.program, [
            self._proxy("placeholder", name, value, owners.get(name, ""))
            for name, value in {**self.program.inputs, **states}.items()
        ]

    def path_of_module(self, mod: nn.Module) -> str:
        """The module's path; a module made in a forward runs under its caller's."""
        return self._paths.get(mod, self.scope.module_path)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """No module is: all are traced through."""
        return False

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace through `m`, remembering the innermost module in which tracing failed."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A module's own tensor becomes a proxy."""
        return self._tensor(attr_val) if id(attr_val) in self._names else attr_val

    def create_arg(self, a: Any) -> Any:
        """Tensors among the arguments are parameters, or constants of the code."""
        return self._tensor(a).node if isinstance(a, Tensor) else super().create_arg(a)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> Any:
        """A call in the dialect's spelling, or the value it is known to have."""
        operands: Any = fx.node.map_aggregate((args, kwargs), self._proxied)
        done = canonical(target, *operands)
        return self._emit(done) if isinstance(done, Call) else done

    # -- recording ----------------------------------------------------------------------------

    def extent(self, proxy: MetaProxy, dim: int) -> Any:
        """An extent of a tensor: an int, or the proxy of a `size` node where it is dynamic."""
        value = proxy.val.shape[dim]
        if value not in DYNAMIC:
            return value
        key = (proxy.node, dim)
        if key not in self._proxies:
            self._proxies[key] = self._emit(Call("size", (proxy, dim)))
        return self._proxies[key]

    def _proxied(self, value: Any) -> Any:
        return self._tensor(value) if isinstance(value, Tensor) else value

    def _tensor(self, tensor: Tensor) -> MetaProxy:
        if id(tensor) not in self._names:
            self._names[id(tensor)] = f"constant_{len(self._constants)}"
            self._constants.append(tensor)
        name = self._names[id(tensor)]
        if name not in self._proxies:
            value = tensor.detach()
            self.tensors[name] = value.float() if value.is_floating_point() else value
            owner = name.rpartition(".")[0]
            self._proxies[name] = self._proxy(
                "get_attr", name, self.tensors[name].to("meta"), owner
            )
        return self._proxies[name]

    def _proxy(self, kind: str, name: str, value: Tensor, owner: str) -> MetaProxy:
        node = self.create_node(kind, name, (), {})
        self._describe(node, owner)
        node.meta["val"] = value
        return MetaProxy(node, self)

    def _emit(self, call: Call) -> MetaProxy:
        args, kwargs = self.create_arg(call.args), self.create_arg(call.kwargs)
        owner = _owner(call, args, self.scope.module_path)
        node = self.create_node(
            "call_function",
            dialect.resolve(call.name),
            args,
            kwargs,
            name=self._node_name(call, owner),
        )
        self._describe(node, owner)
        node.meta["val"] = infer(node)
        return MetaProxy(node, self)

    def _describe(self, node: fx.Node, owner: str) -> None:
        if owner not in self._layers:
            self._layers[owner] = layer_of(self.program.module, owner)
        node.meta = {"owner": owner, "layer": self._layers[owner], "role": None}

    def _node_name(self, call: Call, owner: str) -> str:
        """The owner's path; with the operator, unless it is all that the owner does."""
        space, _, name = call.name.rpartition("::")
        module = self.program.module.get_submodule(owner)
        whole = space and owner and not any(True for _ in module.children())
        return (owner if whole else f"{owner}_{name}").replace(".", "_").strip("_")


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules keep as ordinary attributes."""
    for path, child in module.named_modules():
        for attribute, value in vars(child).items():
            if isinstance(value, Tensor):
                yield f"{path}.{attribute}".lstrip("."), value


def _owner(call: Call, args: tuple[Any, ...], scope: str) -> str:
    """The module a call belongs to: the one that makes it, or a part of it whose weight it takes.

    A mixer that calls `linear` with the weight of its dt_proj calls for its dt_proj.
    """
    weight: Any = args[1] if call.name.startswith("ssmc::") and len(args) > 1 else None
    while is_call(weight, "squeeze"):
        weight = weight.args[0]
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        held_by = str(weight.target).rpartition(".")[0]
        if held_by.startswith(f"{scope}." if scope else ""):
            return held_by
    return scope
