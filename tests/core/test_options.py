"""Passes and their options as text and as data."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmc.core import find_pass
from ssmc.core.options import build_pass, parse_passes
from ssmc.errors import UsageError

from .tiny import make_pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("hadamard", ["hadamard"]),
        (" hadamard , percentile ", ["hadamard", "percentile"]),
        ("hadamard,", ["hadamard"]),
        ("hadamard{}", ["hadamard"]),
        ("hadamard{block=16}", ["hadamard{block=16}"]),
        ("hadamard { block = 16 , residual = TRUE }", ["hadamard{block=16,residual=true}"]),
        ("hadamard{block=none},smooth", ["hadamard", "smooth"]),
        ("hadamard{block=null}", ["hadamard"]),
        ("percentile{p=1e-3},smooth{alpha=1}", ["percentile{p=0.001}", "smooth{alpha=1.0}"]),
        ("quantise{head=no,embedding=0}", ["quantise{embedding=false,head=false}"]),
        ("quantise{head=on,granularity=tensor}", ["quantise{granularity=tensor}"]),
    ],
)
def test_grammar(text: str, expected: list[str]) -> None:
    assert [str(p) for p in parse_passes(text)] == expected


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("hadamrd", "unknown pass 'hadamrd'", "did you mean hadamard?"),
        ("qwertyuiop", "unknown pass 'qwertyuiop'", "`ssmc passes` lists them all"),
        ("hadamard{blok=8}", "pass 'hadamard' has no option 'blok'", "did you mean block?"),
        ("absmax{p=1}", "pass 'absmax' has no option 'p'", "its options: none"),
        ("hadamard{zzz=8}", "has no option 'zzz'", "its options: block, residual, values"),
        ("hadamard{block}", "hadamard: option 'block' has no value", "write block=VALUE"),
        ("hadamard{block=8,block=4}", "option 'block' is given twice", "give it once"),
        ("hadamard{block=8", "cannot read the passes at 'hadamard{block=8'", "name{option=value"),
        ("smooth,hadamard}", "cannot read the passes at 'hadamard}'", "name{option=value"),
        ("hadamard{{block=8}}", "cannot read the passes", "name{option=value"),
        ("hadamard percentile", "cannot read the passes", "name{option=value"),
        (",hadamard", "cannot read the passes at ',hadamard'", "name{option=value"),
        ("hadamard{block=big}", "pass 'hadamard', option 'block': .* (got 'big')", None),
        ("hadamard{block=8.5}", "pass 'hadamard', option 'block': .* (got '8.5')", None),
        ("hadamard{residual=maybe}", "pass 'hadamard', option 'residual': .*'maybe'", None),
        (
            "quantise{granularity=row}",
            "option 'granularity': .*'free', 'tensor' or 'token'.*'row'",
            None,
        ),
        ("smooth{alpha=1.5}", "alpha=1.5.* between 0 and 1", None),
        ("smooth{alpha=nan}", "alpha=nan.* between 0 and 1", None),
        ("percentile{p=0}", "p must be above 0", None),
        ("percentile{p=none}", "option 'p': .* (got 'none')", None),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str, hint: str | None) -> None:
    pattern = message.replace("(", r"\(").replace(")", r"\)").replace("{", r"\{")
    with pytest.raises(UsageError, match=pattern) as caught:
        parse_passes(text)
    assert caught.value.exit_code == 2
    if hint is not None:
        assert hint in str(caught.value.hint)


def test_as_data() -> None:
    smooth = find_pass("smooth")()
    given = [smooth, "hadamard{block=8},absmax", {"quantise": {"head": False}, "percentile": None}]
    names = [str(p) for p in parse_passes(given)]
    assert names == ["smooth", "hadamard{block=8}", "absmax", "quantise{head=false}", "percentile"]
    assert parse_passes(given)[0] is smooth
    with pytest.raises(UsageError, match="not 5"):
        parse_passes([5])  # type: ignore[list-item]


def test_options_have_the_types_of_the_fields() -> None:
    p = build_pass("hadamard", {"block": "16", "residual": "yes"})
    assert p.options() == {"block": 16, "residual": True, "values": False}
    assert [type(value) for value in p.options().values()] == [int, bool, bool]


def _every_kind() -> type[Any]:
    contract = {
        "__annotations__": {
            "count": int,
            "maybe": int | None,
            "ratio": float,
            "flag": bool,
            "mode": Literal["one", "two"],
        },
        "count": 1,
        "maybe": None,
        "ratio": 1.0,
        "flag": True,
        "mode": "one",
    }
    return make_pass("every-kind", **contract)


_OPTIONS = st.fixed_dictionaries(
    {
        "count": st.integers(-3, 2**40),
        "maybe": st.none() | st.integers(-3, 2**40),
        "ratio": st.floats(allow_nan=False),
        "flag": st.booleans(),
        "mode": st.sampled_from(["one", "two"]),
    }
)


@given(options=_OPTIONS)
def test_text_of_a_pass_is_read_back(options: dict[str, Any]) -> None:
    p = _every_kind()(**options)
    (again,) = parse_passes(str(p))
    assert again == p
    assert all(type(again.options()[name]) is type(value) for name, value in options.items())


@given(
    st.none() | st.sampled_from([1, 2, 12, 64]),
    st.booleans(),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(["free", "tensor"]),
)
def test_text_of_built_in_passes_is_read_back(
    block: int | None, flag: bool, fraction: float, granularity: str
) -> None:
    passes = parse_passes(
        [
            {"hadamard": {"block": block, "residual": flag}},
            {"smooth": {"alpha": fraction}, "percentile": {"p": fraction}},
            {"quantise": {"granularity": granularity, "embedding": flag, "head": not flag}},
        ]
    )
    assert parse_passes(",".join(str(p) for p in passes)) == passes
