"""Tensors in files, and the memory of a process that keeps them there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmc.core.store import SMALL, Store, parse_size
from ssmc.errors import UsageError

LARGE = SMALL // 4 + 3  # float32 values, no multiple of a page


def test_a_kept_tensor_has_its_values_shape_and_dtype(tmp_path: Path) -> None:
    store = Store(tmp_path, 2**40)
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int64):
        value = (torch.arange(4 * LARGE) % 100).view(4, LARGE).to(dtype)
        kept = store.keep(value.T)
        assert kept.dtype == dtype
        assert torch.equal(kept, value.T)
        assert kept.is_contiguous()


def test_its_files_have_no_names(tmp_path: Path) -> None:
    kept = Store(tmp_path, 2**40).keep(torch.ones(LARGE))
    assert kept.sum() == LARGE
    assert list(tmp_path.iterdir()) == []


def test_small_tensors_stay_where_they_are(tmp_path: Path) -> None:
    value = torch.ones(3)
    assert Store(tmp_path, 2**40).keep(value).data_ptr() == value.data_ptr()


def test_values_outlive_the_pages_that_are_given_back(tmp_path: Path) -> None:
    store = Store(tmp_path, 2**40)
    values = [torch.randn(LARGE) for _ in range(4)]
    kept = [store.keep(value) for value in values]
    store.limit = 1  # now every look gives back all there is
    store.trim()
    assert all(map(torch.equal, kept, values))


PEAK = """
import sys, torch
from pathlib import Path
from ssmc.core.store import Store

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

before = peak()
limit = int(1.25 * before) + 400 * 2**20
store = Store(Path(sys.argv[1]), limit)
kept = [store.keep(torch.full((2**23,), float(i))) for i in range(48)]
print(peak() / limit, 48 * 2**25 / limit)
total = sum(x.sum().item() for x in kept)
assert total == 2**23 * sum(range(48)), total
"""


def test_a_process_stays_below_its_limit_with_more_than_that_in_files(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak, kept = map(float, ran.stdout.split())
    assert kept > 1.5
    assert peak < 1


def test_what_needs_more_beside_the_files_is_told_so(tmp_path: Path) -> None:
    store = Store(tmp_path, 1000)
    with pytest.raises(
        UsageError, match=r"in use beside the weights, and only 0\.0 GB are allowed"
    ):
        store.keep(torch.ones(LARGE))


def test_sizes_are_read_with_units() -> None:
    sizes = {"6GB": 6 * 10**9, "1.5 GiB": 3 * 2**29, "500m": 5 * 10**8, "4096": 4096, "2kib": 2048}
    assert {text: parse_size(text) for text in sizes} == sizes


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "6 cows", "1e9"])
def test_other_text_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)
