"""Every kernel at the sizes of published models, against its operator, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench_kernels import families, family_cases
from kernel_cases.case import Case
from kernel_cases.check import check, reference

pytestmark = pytest.mark.gpu

CASES = [(family, case) for family in families() for case in family_cases(family)]


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{f}/{c.name}") for f, c in CASES])
def test_kernel_is_its_operator(case: Case) -> None:
    inputs = case.inputs(torch.device("cuda"))
    found = check(case, inputs, reference(case, inputs), {})
    assert not found.problem, found
