"""`tools/model_timeline.py`: kernels of a layer, found and timed among those of a model."""

from __future__ import annotations

import pytest
from model_timeline import Row, Span, main, period, rows

LAYER = ["norm", "linear", "scan", "linear"]


def chain(names: list[str], added: dict[str, float], ran: float) -> list[Span]:
    """Kernels that each end `added` later than the one in front, and ran for `ran` till then."""
    spans, end = [], 0.0
    for name in names:
        end += added[name]
        spans.append(Span(name, end - ran, end))
    return spans


def test_layers_are_found_between_what_is_not_repeated() -> None:
    assert period(["embedding", *LAYER * 5, "head", "copy"]) == 4


def test_a_kernel_adds_what_the_chain_ends_later() -> None:
    added = {"embedding": 9.0, "norm": 1.0, "linear": 5.0, "scan": 2.0, "head": 7.0}
    found = rows(chain(["embedding", *LAYER * 5, "head"], added, ran=20.0))
    assert len(found) == 4
    # A layer may be cut anywhere: its kernels come in a circle.
    start = next(i for i, row in enumerate(found) if row.name == "norm")
    assert [*found[start:], *found[:start]] == [Row(n, 20.0, added[n]) for n in LAYER]


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["130m"]) == 4
    assert "no CUDA device" in capsys.readouterr().err
