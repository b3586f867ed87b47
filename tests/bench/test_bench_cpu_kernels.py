"""`tools/bench_cpu_kernels.py`: what kernels for CPUs have to do at least, and how it is told."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from bench_cpu_kernels import HEADER, main, row, time_case
from cpu_cases import jamba, mamba, mamba2, models
from cpu_cases.case import Case, Moved
from cpu_cases.rates import Rates, measure
from cpu_cases.shared import Call, conv, product

MAMBA = mamba.Mamba("tiny", width=32, inner=64, rank=4, states=16, layers=2, vocabulary=50)
MAMBA2 = mamba2.Mamba2("tiny", width=32, heads=2, head=64, states=16, layers=2)
JAMBA = jamba.Jamba(MAMBA, heads=4, groups=2, head=16, experts=4, chosen=2, inner=32,
                    attentions=1, mixtures=2)  # fmt: skip
RATES = Rates(products=4.0, floats=2.0, exponentials=1.0, launches=1.0,
              moved=((100, 8.0), (1000, 4.0)))  # fmt: skip


def tiny() -> list[Case]:
    """Every kind of case, at sizes that take no time."""
    return [
        *mamba.prompt(MAMBA, 5), *mamba.step(MAMBA), *mamba2.prompt(MAMBA2, 5),
        *mamba2.step(MAMBA2), *jamba.prompt(JAMBA, 5), *jamba.step(JAMBA, 5),
        *jamba.llama("tiny", heads=2, head=16, inner=32, layers=2, length=5),
    ]  # fmt: skip


def kinds(cases: list[Case]) -> set[tuple[str, bool]]:
    """Kernels, for prompts and for steps."""
    return {(case.kernel, case.shape.startswith("1 ")) for case in cases}


def test_bandwidth_is_that_of_the_largest_set_that_is_no_larger() -> None:
    assert [RATES.bandwidth(size) for size in (1, 100, 999, 1000, 10**6)] == [8, 8, 8, 4, 4]


def test_floors_are_bytes_or_all_operations() -> None:
    case = Case("m", "k", "1", abs, tuple, products=40, floats=20, exponentials=10)
    assert case.floor(Moved(320, among=320), RATES) == 320 / 8
    assert case.floor(Moved(320, among=1280), RATES) == 320 / 4
    assert case.floor(Moved(8, among=8), RATES) == 10 + 10 + 10


def test_a_state_that_is_written_over_is_moved_twice_but_lies_in_one_place() -> None:
    state, row = torch.zeros(5), torch.zeros(2)
    case = Case("m", "k", "1", abs, tuple, sets=3)
    assert case.moved((state, row, 1.0), [state]) == Moved(4 * 12, among=3 * 4 * 7)


def test_work_is_counted_from_shapes() -> None:
    case = conv(Call("m", 3), 96, 64, 64)
    assert (case.products, case.exponentials) == (3 * 64 * 4, 3 * 64)
    args = case.inputs()
    state, parameters = 2 * 3 * 64, 64 * (4 + 4 + 4 + 4 + 4)  # x, w and u scales, bias; 4 taps
    assert case.moved(args, case.run(*args)).bytes == 2 * 3 * 64 + state + parameters
    case = product(Call("m", 3), "p", 10, 20)
    assert case.products == 3 * 10 * 20
    scan = next(c for c in mamba.prompt(MAMBA, 5) if "scan" in c.kernel)
    assert (scan.exponentials, scan.floats) == (5 * 64 * (16 + 2), 4 * 5 * 64 * 16)
    looking = next(c for c in jamba.prompt(JAMBA, 5) if c.kernel == "attention")
    assert looking.exponentials == 4 * (1 + 2 + 3 + 4 + 5)


def test_a_step_moves_what_it_touches() -> None:
    """A row of an embedding, a row of a cache, the chosen experts."""
    moved = {}
    for case in (*mamba.step(MAMBA), *jamba.step(JAMBA, 5)):
        args = case.inputs()
        moved[case.kernel] = case.moved(args, case.run(*args)).bytes
    position = token = 8
    assert moved["embedding"] == token + 32 + 4 + 4 * 32
    assert moved["cache"] == position + 2 * 4 * 2 * 16
    assert moved["cache, quantised"] == position + 2 * (4 * 16 + 16 + 4)
    assert moved["experts"] == (32 + 4) + 2 * 64 * (32 + 4) + 8 * 2 + 4 * 2 * 64


@pytest.mark.parametrize("case", tiny(), ids=lambda case: f"{case.kernel}-{case.shape}")
def test_every_case_runs(case: Case) -> None:
    before = torch.get_num_threads()
    try:
        measured = time_case(case, {1: RATES}, rounds=1)
    finally:
        torch.set_num_threads(before)
    assert measured.medians[0] >= measured.fastest[0] > 0
    assert measured.floors[0] > 0
    assert row(case, measured).count("|") == HEADER.partition("\n")[0].count("|")


def test_the_models_have_the_same_kernels() -> None:
    assert kinds(list(models.cases())) == kinds(tiny())


def test_rates_are_measured() -> None:
    before = torch.get_num_threads()
    try:
        rates = measure(2, sizes=(2**14, 2**15), runs=3)
    finally:
        torch.set_num_threads(before)
    assert min(rates.products, rates.floats, rates.launches, rates.bandwidth(2**15)) > 0
    assert rates.products > rates.exponentials > 0
    assert "GB/s of 32 KB" in str(rates)


def test_a_name_that_no_kernel_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", "no such"])
    assert ended.value.code == 2
    assert "no kernel has no such" in capsys.readouterr().err
