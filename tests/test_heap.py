"""Freed memory is kept where it was asked for, and nowhere else."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told to keep memory"
)

# `grown(f)`: by how many MiB the process has grown once f() has been called, in tensors of 40 MiB
START = """
import torch, fisherlab as fl
from fisherlab.heap import freed_memory_kept

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

def use():
    for _ in range(3):
        torch.ones(40 * 2**18)

def grown(f):
    before = resident()
    f()
    return resident() - before
"""


def run(code: str, **environment: str) -> None:
    """`code` in a process whose heap nobody has touched."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    inherited.pop("GLIBC_TUNABLES", None)
    found = subprocess.run(
        [sys.executable, "-c", START + code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_memory_is_kept_inside_the_block_and_returned_behind_it() -> None:
    run("""
assert grown(use) < 20
before = resident()
with freed_memory_kept():
    with freed_memory_kept():
        use()
    assert resident() - before > 30, "the outer block still stands"
    assert grown(use) < 10, "freed memory was not used again"
assert resident() - before < 20
""")


def test_a_process_that_keeps_memory_keeps_it_behind_a_block() -> None:
    run("""
assert fl.keep_freed_memory()
with freed_memory_kept():
    use()
assert grown(use) < 10
before = resident()
kept = torch.ones(40 * 2**18)
assert resident() - before < 10, "the memory was not there any more"
""")


def test_a_comparison_leaves_the_heap_as_it_was() -> None:
    run("""
model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 4))
fl.compare(model, torch.nn.CrossEntropyLoss(), torch.randn(8, 20), torch.arange(8) % 4)
assert grown(use) < 20
""")


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_ARENA_MAX_": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}],
)
def test_settings_of_the_environment_are_left_alone(environment: dict[str, str]) -> None:
    run("assert not fl.keep_freed_memory(); assert grown(use) < 20", **environment)
