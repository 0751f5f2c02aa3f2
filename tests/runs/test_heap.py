"""A process keeps what it frees: the next large tensors cost no page faults."""

import os
import subprocess
import sys

import pytest
import torch

from prl_lightning.runs.heap import drop_pages

# Prints what the function returns, and the page faults of a tensor after a larger one was freed.
SECOND_TENSOR = """
import resource
import torch
from prl_lightning.runs.heap import keep_freed_memory

is_set = keep_freed_memory()
torch.ones(30_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(20_000_000)
print(is_set, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE_PAGES = 20_000_000 * 4 // 2**21  # the fewest that the second tensor can have


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a function of Linux")
PAGE = os.sysconf("SC_PAGESIZE")


@LINUX
@pytest.mark.parametrize(
    ("offset", "first", "pages"), [(0, 0, 3), (1, PAGE, 2), (PAGE - 1, PAGE, 3)]
)
def test_dropped_pages_are_zero_and_others_are_kept(offset: int, first: int, pages: int) -> None:
    values = torch.ones(8 * PAGE, dtype=torch.uint8)
    values = values[-values.data_ptr() % PAGE :]  # begins with a page
    drop_pages(values.data_ptr() + offset, 3 * PAGE + 1)
    expected = torch.ones_like(values)
    expected[first : first + pages * PAGE] = 0
    assert values.equal(expected)
    values[first] = 1  # and can be used again
    assert values[first] == 1


@LINUX
@pytest.mark.parametrize(
    ("setting", "is_set", "fewest", "most"),
    [
        ({}, "True", 0, 10),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False", HUGE_PAGES, None),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}, "False", HUGE_PAGES, None),
    ],
)
def test_a_tensor_uses_the_memory_of_an_earlier_one(
    setting: dict[str, str], is_set: str, fewest: int, most: int | None
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SECOND_TENSOR],
        env=os.environ | setting,
        capture_output=True,
        text=True,
        check=True,
    )
    returned, faults = result.stdout.split()
    assert returned == is_set
    assert fewest <= int(faults)
    assert most is None or int(faults) <= most
