"""The contract of a pass, and how passes are found by name.

A pass is a frozen dataclass: its fields are its command-line options.

    @register
    @dataclass(frozen=True)
    class FoldNorm(Pass):
        '''One line that says what it does.

        Replaces:  linear(rms_norm(x, gamma), W)
        With:      linear(rms_norm(x), W * gamma)
        '''
        name = "fold-norm"
        stage = "rewrite"
        exact_to = 1e-5
        rules = ((op.rms_norm("x", "gamma"), "fold"),)

        def fold(self, g: Graph, m: Match) -> Node | None: ...
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from abc import ABC
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from ssmc.catalogue import builtin_passes, plugin_passes
from ssmc.core.graph import Graph
from ssmc.core.journal import Journal, Log
from ssmc.core.pattern import Match, Pattern
from ssmc.core.ranks import Ranks
from ssmc.errors import SsmcError, UsageError, did_you_mean

Stage = Literal["analyse", "rewrite", "reconstruct", "calibrate", "quantise"]
STAGES: tuple[str, ...] = typing.get_args(Stage)


class Pass(ABC):
    """One named step of a compilation.

    `after` names passes that must come earlier if they are in the plan at all; `needs` names
    results that must be there (a pass provides its own name and what `provides` lists): those
    missing are added to the plan. A pass that changes the graph invalidates every analysis but
    those in `preserves`. `exact_to` is the relative error of the logits it may add in float32
    (None for passes that quantise: they are reported, not limited). A recipe adds its scheme where
    no pass of the quantise stage is named, those apart that stand `beside_scheme`.

    Write `rules`, or override `run`.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    after: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()
    preserves: ClassVar[tuple[str, ...]] = ()
    exact_to: ClassVar[float | None] = 0.0
    beside_scheme: ClassVar[bool] = False
    rules: ClassVar[tuple[tuple[Pattern, str], ...]] = ()

    def check(self, g: Graph) -> None:
        """Raise UsageError where options name what `g` lacks; asked before any pass runs."""
        return None

    def run(self, g: Graph, context: Context) -> None:
        """Apply every rule wherever its pattern holds, in execution order."""
        for node in g.nodes:
            self._apply(g, node)

    def _apply(self, g: Graph, node: fx.Node) -> None:
        for pattern, rewrite in self.rules:
            if node.graph is not g.module.graph or node._erased:
                return
            match = pattern.match(node)
            if match is not None:
                self._rewrite(g, match, rewrite)

    def _rewrite(self, g: Graph, match: Match, rewrite: str) -> None:
        node = match.node
        with g.before(node):
            new = getattr(self, rewrite)(g, match)
        if new is not None:
            g.match(node)
            if new is not node:
                new.meta.setdefault("role", node.meta.get("role"))
                g.replace(node, new)

    def options(self) -> dict[str, Any]:
        """The options and their values, in the order of the fields."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def __str__(self) -> str:
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        }
        inside = ",".join(f"{k}={_text(v)}" for k, v in changed.items())
        return f"{self.name}{{{inside}}}" if inside else self.name


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ";".join(map(str, value))
    return str(value).lower() if value in (True, False) else str(value)


@dataclasses.dataclass
class Context:
    """What passes may use beside the graph.

    `calibration` holds batches of inputs (each a tuple of tensors), `probe` one such batch;
    `progress(done, total)` reports how far a long pass is. `log` is where the running pass may keep
    how far it came, which `journal` writes to the disk, if there is one. `kernels` are functions in
    the place of operators, by name, where the batches are run and there are faster ones. `ranks`
    are the processes that share the batches.
    """

    calibration: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    probe: tuple[Any, ...] | None = None
    seed: int = 0
    progress: typing.Callable[[int, int], None] = lambda done, total: None
    journal: Journal | None = None
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    log: Log = dataclasses.field(default_factory=Log)
    kernels: typing.Mapping[str, typing.Callable[..., Any]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def device(self) -> torch.device:
        """Where the batches are, and the graph runs; the CPU where there are none."""
        return self.calibration[0][0].device if self.calibration else torch.device("cpu")

    def given(self) -> list[tuple[Any, ...]]:
        """The calibration batches; UsageError where there are none."""
        if not self.calibration:
            raise UsageError(
                "no calibration text", hint="pass calibration=... or --calibration FILE.jsonl"
            )
        return self.calibration

    def own(self) -> typing.Sequence[tuple[Any, ...]]:
        """Those of the batches that this process takes; UsageError as above."""
        return self.ranks.own(self.given())

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """The calibration batches, one by one, reporting progress; UsageError as above."""
        for done, batch in enumerate(self.given()):
            self.progress(done, len(self.calibration))
            yield batch
        self.progress(len(self.calibration), len(self.calibration))


_registered: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Class decorator that checks a pass and makes it known by its name.

    Raises TypeError for a class that is not a frozen dataclass, lacks `name`, `stage` or a
    docstring, names other passes by anything but a tuple, or takes the name of a pass that comes
    with ssmc.
    """
    name = getattr(cls, "name", None)
    params = getattr(cls, "__dataclass_params__", None)
    if not (isinstance(cls, type) and issubclass(cls, Pass)) or params is None or not params.frozen:
        raise TypeError(f"{cls.__name__} must be a frozen dataclass derived from ssmc.Pass")
    if not name or getattr(cls, "stage", None) not in STAGES:
        raise TypeError(f"{cls.__name__} needs a name and a stage out of {', '.join(STAGES)}")
    for names in ("after", "needs", "provides", "preserves"):
        if not isinstance(getattr(cls, names), tuple):
            raise TypeError(f"{cls.__name__}: `{names}` is a tuple of names, as in ('fold-norm',)")
    if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):
        raise TypeError(f"{cls.__name__} needs a docstring: one line, then Replaces and With")
    if name in builtin_passes() and not cls.__module__.startswith("ssmc.passes."):
        raise TypeError(f"{cls.__name__}: the name '{name}' belongs to a pass of ssmc")
    _registered[name] = cls
    return cls


def known_passes() -> list[str]:
    """The names of all passes: those of ssmc, of installed packages, and registered ones."""
    return sorted({*builtin_passes(), *plugin_passes(), *_registered})


def origin(name: str) -> str:
    """Where a pass comes from: `ssmc`, or the package and version that brings it."""
    if name in builtin_passes():
        return "ssmc"
    point = plugin_passes().get(name)
    if point is None:
        return _registered[name].__module__
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def find_pass(name: str) -> type[Pass]:
    """The class of the pass called `name`, imported only now. UsageError for an unknown one."""
    if name not in _registered:
        _import(name)
    return _registered[name]


def _import(name: str) -> None:
    builtin = builtin_passes().get(name)
    if builtin:
        importlib.import_module(builtin)
    elif point := plugin_passes().get(name):
        _load_plugin(point)
    if name not in _registered:
        raise UsageError(
            f"unknown pass '{name}'",
            hint=did_you_mean(name, known_passes()) or "`ssmc passes` lists them all",
        )


def _load_plugin(point: EntryPoint) -> None:
    try:
        found = register(point.load()).name
        if found != point.name:
            raise ValueError(f"it is a pass called '{found}'")
    except SsmcError:
        raise
    except Exception as error:
        raise UsageError(
            f"pass '{point.name}' of {origin(point.name)} cannot be loaded: {error}",
            hint=f"its entry point is {point.value}; reinstall or remove that package",
        ) from error
