"""The contract of a pass and how passes are found."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest

import ssmc
from ssmc import catalogue
from ssmc.core import Context, Graph, Match, Pass, find_pass, known_passes, op, passes, register
from ssmc.core.passes import origin
from ssmc.errors import PassError, UsageError

from .tiny import apply, make_pass, toy, toy_context


@pytest.mark.parametrize("name", known_passes())
def test_built_in_passes_keep_the_contract(name: str) -> None:
    cls = find_pass(name)
    documentation = inspect.getdoc(cls) or ""
    assert {"Replaces:", "With:"} <= set(documentation.split())
    assert len(documentation.splitlines()[0]) > 20
    assert origin(name) == "ssmc"
    assert (cls.stage != "rewrite") or cls.exact_to is not None
    assert register(cls) is cls


def _class(**body: Any) -> type[Any]:
    return type("Mine", (Pass,), {"name": "mine", "stage": "rewrite", "__doc__": "Mine."} | body)


frozen = dataclass(frozen=True)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no dataclass": (lambda: _class(), "must be a frozen dataclass"),
    "not frozen": (lambda: dataclass(_class()), "must be a frozen dataclass"),
    "no pass": (lambda: frozen(type("Mine", (), {})), "derived from ssmc.Pass"),
    "no name": (lambda: frozen(_class(name="")), "needs a name and a stage"),
    "no stage": (lambda: frozen(_class(stage=None)), "needs a name and a stage"),
    "wrong stage": (
        lambda: frozen(_class(stage="rewite")),
        "out of analyse, rewrite, reconstruct, calibrate",
    ),
    "no docstring": (lambda: frozen(_class(__doc__=None)), "needs a docstring"),
    "needs is a string": (lambda: frozen(_class(needs="hadamard")), "`needs` is a tuple of names"),
    "after is a string": (lambda: frozen(_class(after=("hadamard"))), "`after` is a tuple of"),
    "name of ssmc": (lambda: frozen(_class(name="hadamard")), "'hadamard' belongs to a pass of"),
    "name not loaded": (lambda: frozen(_class(name="ssm-sites")), "'ssm-sites' belongs to a pass"),
}


@pytest.mark.parametrize("case", WRONG)
def test_registration_is_checked(case: str) -> None:
    build, message = WRONG[case]
    before = dict(passes._registered)
    with pytest.raises(TypeError, match=message):
        register(build())
    assert passes._registered == before


def test_registered_pass_is_found() -> None:
    assert "mine" not in known_passes()
    cls = make_pass("mine")
    assert find_pass("mine") is cls
    assert "mine" in known_passes()
    assert origin("mine") == cls.__module__


def test_unknown_pass() -> None:
    with pytest.raises(UsageError, match="unknown pass 'hadamrd'") as caught:
        find_pass("hadamrd")
    assert caught.value.hint == "did you mean hadamard?"


@frozen
class Doubled(Pass):
    """A pass of another package."""

    name = "doubled"
    stage = "rewrite"


def _entry(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any], name: str = "doubled"
) -> EntryPoint:
    dist = SimpleNamespace(name="their-package", version="2.1")
    point: Any = SimpleNamespace(name=name, value="their.module:Doubled", load=load, dist=dist)
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [point])
    return point


def test_entry_point_is_loaded_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    _entry(monkeypatch, lambda: loaded.append(1) or Doubled)
    assert "doubled" in known_passes()
    assert origin("doubled") == "their-package 2.1"
    assert not loaded
    assert find_pass("doubled") is Doubled
    assert find_pass("doubled") is Doubled
    assert len(loaded) == 1


def _missing() -> Any:
    raise ModuleNotFoundError("No module named 'their'")


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (_missing, "No module named 'their'"),
        (lambda: dict, "must be a frozen dataclass"),
        (lambda: frozen(_class(name="other")), "it is a pass called 'other'"),
        (lambda: frozen(_class(name="hadamard")), "belongs to a pass of ssmc"),
    ],
)
def test_entry_point_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any], reason: str
) -> None:
    _entry(monkeypatch, load)
    with pytest.raises(UsageError, match=reason) as caught:
        find_pass("doubled")
    assert str(caught.value).startswith("pass 'doubled' of their-package 2.1 cannot be loaded: ")
    assert "their.module:Doubled" in str(caught.value.hint)


def test_entry_point_keeps_the_type_of_our_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise PassError("needs a licence")

    _entry(monkeypatch, load)
    with pytest.raises(PassError, match=r"^needs a licence$"):
        find_pass("doubled")


def test_entry_point_does_not_replace_a_pass_of_ssmc(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry(monkeypatch, lambda: Doubled, name="hadamard")
    assert find_pass("hadamard").__module__ == "ssmc.passes.hadamard"
    assert origin("hadamard") == "ssmc"


@frozen
class Fuse(Pass):
    """Rules as data.

    Replaces:  silu(linear(x, W)), add
    With:      relu(linear(x, W)), and nothing
    """

    name = "fuse"
    stage = "rewrite"
    exact_to = 10.0
    rules = ((op.silu(op.linear("x", "W")), "relu"), (op.add("a", "b"), "leave"))

    def relu(self, g: Graph, m: Match) -> Any:
        assert m.W.target == "up.weight"
        return g.call("relu", m.node.args[0], like=m.node)

    def leave(self, g: Graph, m: Match) -> Any:
        return g.skip(m.node, "it stays")


def test_rules_rewrite_match_and_skip() -> None:
    register(Fuse)
    _, g = toy()
    (silu,) = g.calls("silu")
    silu.meta["role"] = "activation"
    adds, user = g.calls("add"), next(iter(silu.users))
    record = apply(g, "fuse", toy_context())["fuse"]
    (relu,) = g.calls("relu")
    assert not g.calls("silu")
    assert relu in user.all_input_nodes
    assert relu.meta["role"] == "activation"
    assert record.matched == [silu.name]
    assert record.skipped == [{"node": n.name, "reason": "it stays"} for n in adds]


def test_batches_report_progress_and_refuse_none() -> None:
    seen: list[tuple[int, int]] = []
    batches: list[Any] = [(1,), (2,), (3,)]
    context = Context(batches, progress=lambda done, total: seen.append((done, total)))
    assert list(context.batches()) == batches
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    with pytest.raises(UsageError, match="no calibration text"):
        next(Context().batches())


def test_public_names() -> None:
    assert all(getattr(ssmc, name) is not None for name in ssmc.__all__)
