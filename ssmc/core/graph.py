"""A traced model: a torch.fx graph, its tensors, its states, and what passes do to them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from ssmc.core import dialect
from ssmc.core.state import OPEN, States, StateSpec, fresh_states, with_room
from ssmc.core.store import Store
from ssmc.core.walk import Leaf, Seen, walk
from ssmc.errors import NumericsError, PassError

BATCH, LENGTH, ROOM = 1009, 1013, 1019
"""Primes that stand for the dynamic extents in meta tensors: the sequences, their tokens in a call,
and the tokens that open states have room for."""
Output = tuple[Any, States]


class Graph:
    """A model as one graph of functional operators.

    Inputs are the model's own (`inputs`), then one placeholder a state; the output node holds
    `(result, (new_state, ...))` with the states in the order of `states`. Tensors are buffers
    of `module`, named as in the model they come from, and never changed in place: the model
    that was traced stays as it was.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        inputs: Iterable[str],
        states: Iterable[StateSpec] = (),
    ) -> None:
        self.module = fx.GraphModule(root, graph, class_name="Graph")
        self.inputs = tuple(inputs)
        self.states = tuple(states)
        self.elsewhere: torch.device | None = (
            None  # where it is to run, if not where its tensors are
        )
        self.store: Store | None = None  # where tensors are kept that need not stay in memory
        self.facts: dict[str, Any] = {}  # what passes found of this graph's nodes, by name
        self.ranges: dict[str, Any] = {}  # observers of activations, by node name
        self.matched: list[str] = []
        self.skipped: list[dict[str, str]] = []
        self.notes: list[str] = []

    # -- reading ------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[fx.Node]:
        """Every node, in execution order."""
        return list(self.module.graph.nodes)

    def calls(self, name: str) -> list[fx.Node]:
        """Every call of the operator called `name` (`ssmc::linear`, `add`)."""
        return [n for n in self.nodes if is_call(n, name)]

    def node(self, name: str) -> fx.Node:
        """The node called `name`; KeyError where there is none."""
        found = next((n for n in self.nodes if n.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    @property
    def result(self) -> Any:
        """The node (or tuple of nodes) the graph gives as its result."""
        return self._output.args[0][0]  # type: ignore[index]

    @property
    def new_states(self) -> tuple[fx.Node, ...]:
        """The nodes of the states after the call, in the order of `states`."""
        return tuple(self._output.args[0][1])  # type: ignore[index, arg-type]

    @property
    def _output(self) -> fx.Node:
        return self.nodes[-1]

    # -- tensors ------------------------------------------------------------------------------

    def params(self) -> dict[str, torch.Tensor]:
        """Every tensor a node refers to, by name, in order of first use."""
        names = dict.fromkeys(str(n.target) for n in self.nodes if n.op == "get_attr")
        return {name: self.module.get_buffer(name) for name in names}

    @property
    def device(self) -> torch.device | None:
        """Where the tensors are; None without any."""
        return next((t.device for t in self.module.buffers()), None)

    @property
    def runs_on(self) -> torch.device:
        """Where the graph is to run: where its tensors are, or each is fetched when needed."""
        return self.elsewhere or self.device or torch.device("cpu")

    def param(self, node: fx.Node) -> torch.Tensor:
        """The tensor behind a get_attr node."""
        if node.op != "get_attr":
            raise PassError(f"node '{node.name}' is computed ({node.op}), not a parameter")
        return self.module.get_buffer(str(node.target))

    def set_param(self, node: fx.Node, value: torch.Tensor) -> fx.Node:
        """Replace the tensor behind a get_attr node, for all its users."""
        value = value.to(self.param(node).device)  # which refuses what is no parameter
        put_tensor(self.module, str(node.target), self.keep(value))
        node.meta["val"] = value.to("meta")
        return node

    def new_param(self, name: str, value: torch.Tensor) -> fx.Node:
        """A get_attr node for a new tensor called `name`, or `name_1`, ... where that is taken."""
        name = self._free_name(name.lstrip("."))  # the owner of a call in the root module is ''
        put_tensor(self.module, name, self.keep(value.to(self.device or value.device)))
        first = next(n for n in self.nodes if n.op != "placeholder")
        with self.module.graph.inserting_before(first):
            node = self.module.graph.get_attr(name)
        node.meta.update(val=value.to("meta"), owner=name.rpartition(".")[0])
        return node

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """`value`, where memory is short in a file that takes none while it is not used."""
        return value if self.store is None else self.store.keep(value)

    def set_state(self, state: fx.Node, value: torch.Tensor) -> None:
        """Let the graph take `state`, one of its placeholders, in the shape and dtype of `value`.

        The first dimension of `value` is the batch.
        """
        state.meta["val"] = value.to("meta")
        shape = tuple(OPEN if extent == ROOM else extent for extent in value.shape[1:])
        spec = StateSpec(state.name, shape, value.dtype)
        self.states = tuple(spec if s.name == state.name else s for s in self.states)

    def add_state(self, name: str, value: torch.Tensor, like: fx.Node) -> fx.Node:
        """A further state of the shape and dtype of `value`; calls keep it as it is until `carry`.

        Its placeholder stands behind all others, with the owner and layer of `like`.
        """
        last = [n for n in self.nodes if n.op == "placeholder"][-1]
        with self.module.graph.inserting_after(last):
            state = self.module.graph.placeholder(name)
        state.meta.update({k: like.meta[k] for k in ("owner", "layer") if k in like.meta})
        self.states += (StateSpec(state.name, ()),)
        self.set_state(state, value)
        self._set_new_states((*self.new_states, state))
        return state

    def carry(self, state: fx.Node, new: fx.Node) -> None:
        """Let `new` be what `state`, one of the placeholders, is after a call."""
        names = [spec.name for spec in self.states]
        at, states = names.index(state.name), list(self.new_states)
        states[at] = new
        self._set_new_states(tuple(states))

    def _set_new_states(self, states: tuple[fx.Node, ...]) -> None:
        self._output.args = ((self.result, states),)

    def _free_name(self, name: str) -> str:
        taken = {name for name, _ in self.module.named_buffers(remove_duplicate=False)}
        numbered = (f"{name}_{i}" for i in itertools.count(1))
        return next(n for n in itertools.chain([name], numbered) if n not in taken)

    # -- rewriting ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New calls go in front of `node`."""
        with self.module.graph.inserting_before(node):
            yield

    @contextlib.contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """The next new call goes right behind `node` (behind all inputs, if it is one)."""
        if node.op not in ("placeholder", "get_attr"):
            with self.module.graph.inserting_after(node):
                yield
        else:
            with self.before(next(n for n in self.nodes if n.op in ("call_function", "output"))):
                yield

    def call(self, name: str, *args: Any, like: fx.Node, suffix: str = "") -> fx.Node:
        """A call of operator `name` at the insertion point.

        Its value is inferred by running the operator on meta tensors; owner and layer are
        taken over from `like`, whose name with `suffix` names the node.
        """
        hint = f"{like.name}_{suffix}" if suffix else like.name
        node = self.module.graph.create_node(
            "call_function", dialect.resolve(name), args, {}, name=hint
        )
        node.meta.update({k: like.meta[k] for k in ("owner", "layer") if k in like.meta})
        node.meta["val"] = infer(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` use `new`, except `new` itself, and drop `old` if unused."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if not old.users and old.op not in ("placeholder", "get_attr"):
            self.module.graph.erase_node(old)

    def match(self, node: fx.Node) -> fx.Node:
        """Count `node` among those the running pass applied to."""
        self.matched.append(node.name)
        return node

    def skip(self, node: fx.Node, reason: str) -> fx.Node | None:
        """Say why the running pass leaves `node` alone. Returns None, to end a rewrite with."""
        self.skipped.append({"node": node.name, "reason": reason})
        return None

    def note(self, text: str) -> None:
        """Say something the running pass's record should hold, once."""
        if text not in self.notes:
            self.notes.append(text)

    def finish(self) -> None:
        """Drop what nothing uses any more, infer values anew, and recompile."""
        self.module.graph.eliminate_dead_code()
        for node in self.nodes:
            if node.op == "call_function":
                node.meta["val"] = infer(node)
        drop_unused_tensors(self.module, set(self.params()))
        self.module.recompile()

    def copy(self) -> Graph:
        """An independent graph over the same tensors; facts, which hold nodes, are found anew."""
        graph = fx.Graph()
        names: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.module.graph, names)
        graph.output(output)
        twin = Graph(self.module, graph, self.inputs, self.states)
        for old, new in names.items():
            new.meta = dict(old.meta)
        twin.ranges = dict(self.ranges)
        twin.store, twin.elsewhere = self.store, self.elsewhere
        return twin

    # -- running ------------------------------------------------------------------------------

    def __call__(self, *inputs: torch.Tensor, states: States | None = None) -> Output:
        """The result and the new states, from the inputs and the states (default: fresh).

        States that lack room for the inputs are extended first.
        """
        return self.run(*inputs, states=self._states(inputs, states))

    def run(self, *inputs: torch.Tensor, states: States) -> Output:
        """The same from states that have room for the inputs: none of their values is looked at.

        It runs where the inputs are, and fetches the tensors that are elsewhere one by one.
        """
        if self.device in (None, inputs[0].device):
            with torch.no_grad():
                result, new = self.module(*inputs, *(states[s.name] for s in self.states))
        else:
            wanted = (self.result, self.new_states)
            result, new = walk(self.nodes, wanted, self.leaves(inputs, states), unseen)
        return result, dict(zip((s.name for s in self.states), new, strict=True))

    def watch(
        self,
        seen: Seen,
        *inputs: torch.Tensor,
        states: States | None = None,
    ) -> Any:
        """Run where the inputs are, showing `seen` the value of every call. Returns the result.

        What calls read beside is shown as well, when one first reads it, and only then are tensors
        fetched that are elsewhere, and fresh states (the default) made. Only the result is kept
        for longer than calls to come read it.
        """
        given = {} if states is None else self._states(inputs, states)
        return walk(self.nodes, self.result, self.leaves(inputs, given), seen)

    def leaves(self, inputs: Sequence[torch.Tensor], states: States | None = None) -> Leaf:
        """What gives the inputs, the states, fresh unless given, and the parameters, there."""
        given = dict(zip(self.inputs, inputs, strict=True)) | (states or {})
        specs = {spec.name: spec for spec in self.states}
        device, room = inputs[0].device, self.tokens(inputs)

        def leaf(node: fx.Node) -> torch.Tensor:
            if node.op == "get_attr":
                return fetch(self.param(node), device)
            if node.name in given:
                return given[node.name]
            return specs[node.name].zeros(len(inputs[0]), device, room)

        return leaf

    def _states(self, inputs: tuple[torch.Tensor, ...], states: States | None) -> States:
        if states is None:
            states = fresh_states(self.states, inputs[0].shape[0], inputs[0].device)
        if any(spec.is_open for spec in self.states):
            return with_room(self.states, states, self.tokens(inputs))
        return states

    def tokens(self, inputs: Sequence[torch.Tensor]) -> int:
        """How many tokens a sequence has in a call with these inputs; 0 where none has a length."""
        return length_of(inputs, [self.node(name).meta["val"] for name in self.inputs]) or 0


def unseen(node: fx.Node, value: Any) -> None:
    """Nobody watches."""


def fetch(value: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """A tensor where it is needed: from the host's memory by way of pages that a GPU can read."""
    if device is None or value.device == device:
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def is_call(value: Any, *names: str) -> bool:
    """Whether `value` is a node that calls one of the operators named."""
    return (
        isinstance(value, fx.Node)
        and value.op == "call_function"
        and dialect.target_name(value.target) in names
    )


def infer(node: fx.Node) -> Any:
    """The meta value of a call, from the meta values of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if not kwargs:
        elementwise = is_call(node, *dialect.ELEMENTWISE)
        value = _broadcast(node, args) if elementwise else _reduced(node, args)
        if value is not None:
            return value
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _broadcast(node: fx.Node, args: Sequence[Any]) -> torch.Tensor | None:
    """The meta value of an elementwise function of tensors of one type of floats, and of numbers.

    Or of sums and products of integers. torch's own of these are written in Python, and its
    compiler is imported for them (2 s, 110 MB).
    """
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if len({x.dtype for x in tensors}) != 1 or not _keep_type(node, tensors[0], args):
        return None
    rank = max(x.dim() for x in tensors)
    extents = zip(*((1,) * (rank - x.dim()) + tuple(x.shape) for x in tensors), strict=True)
    shape = []
    for found in map(set, extents):
        if len(found - {1}) > 1:
            return None  # torch says what is wrong
        shape.append(max(found, key=lambda extent: extent != 1))
    return tensors[0].new_empty(shape)


def _reduced(node: fx.Node, args: Sequence[Any]) -> torch.Tensor | None:
    """The meta value of a softmax, a sum or a mean of floats, over a dimension; as `_broadcast`."""
    if len(args) < 2 or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return None
    (x, dim), keep = args[:2], args[2] if len(args) > 2 else False
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        return None
    if is_call(node, "softmax") and len(args) == 2:
        return x.new_empty(x.shape)
    if is_call(node, "sum", "mean") and isinstance(keep, bool) and len(args) <= 3:
        shape = list(x.shape)
        shape[dim % x.dim() : dim % x.dim() + 1] = [1] if keep else []
        return x.new_empty(shape)
    return None


def _keep_type(node: fx.Node, first: torch.Tensor, args: Sequence[Any]) -> bool:
    """Whether a function of numbers gives what has the type of its first tensor."""
    if first.is_floating_point():
        return all(isinstance(x, torch.Tensor | int | float) for x in args)
    whole = all(isinstance(x, torch.Tensor) or type(x) is int for x in args)
    return whole and first.dtype != torch.bool and is_call(node, "add", "sub", "mul")


def length_of(inputs: Sequence[Any], marked: Iterable[torch.Tensor]) -> Any:
    """The length of the first of `inputs` whose meta tensor has one; None where none has."""
    pairs = zip(inputs, marked, strict=True)
    return next((given.shape[1] for given, meta in pairs if LENGTH in meta.shape[1:2]), None)


def meta_state(spec: StateSpec, batch: int = BATCH) -> torch.Tensor:
    """The meta tensor that stands for a state, [batch, *shape] with ROOM where it is open."""
    return torch.empty((batch, *spec.sized(ROOM)), dtype=spec.dtype, device="meta")


def put_tensor(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make `value` the buffer called `name` (dotted), with the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if leaf in root._parameters or leaf in root.__dict__:
        delattr(root, leaf)
    root.register_buffer(leaf, value.detach())


def drop_unused_tensors(root: nn.Module, used: set[str]) -> None:
    """Delete buffers outside `used`, and the modules left empty."""
    for prefix, module in list(root.named_modules(remove_duplicate=False)):
        for leaf in list(module._buffers):
            if f"{prefix}.{leaf}".lstrip(".") not in used:
                del module._buffers[leaf]
    for _, module in reversed(list(root.named_modules(remove_duplicate=False))):
        for name, child in list(module._modules.items()):
            if child is not None and not child._buffers and not child._modules:
                del module._modules[name]


def check_finite(node: fx.Node, value: Any) -> None:
    """Raise NumericsError naming `node` where `value` holds NaN or infinity."""
    for tensor in value if isinstance(value, tuple | list) else (value,):
        floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if floating and not _is_finite(tensor):
            where = f"node '{node.name}'" if node.op != "get_attr" else f"tensor '{node.target}'"
            raise NumericsError(
                f"{where} holds NaN or infinity",
                hint="check the checkpoint and the calibration text",
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: then their sum is finite, unless it overflows."""
    finite = torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()
    return bool(finite)
