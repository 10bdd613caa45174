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


def test_a_process_that_keeps_memory_uses_it_again() -> None:
    run("""
assert grown(use) < 20
assert fl.keep_freed_memory()
for _ in range(5):  # small tensors settle between the large ones
    use()
assert grown(use) < 10, "freed memory was not used again"
before = resident()
kept = torch.ones(40 * 2**18)
assert resident() - before < 10, "the memory was not there any more"
""")


# `mallopt` is replaced by one that counts: nothing but the opt-in may call it
COUNTED = """
from fisherlab import heap
calls = []
class Library:
    def mallopt(self, option, value):
        calls.append((option, value))
    def malloc_trim(self, pad):
        calls.append(("trim", pad))
heap._glibc = lambda: Library()
model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 4))
batch = torch.randn(8, 20), torch.arange(8) % 4
"""


def test_the_library_never_tells_the_allocator_anything() -> None:
    run(
        COUNTED
        + """
fl.compare(model, torch.nn.CrossEntropyLoss(), *batch)
fl.capture(model, torch.nn.CrossEntropyLoss(), *batch)
optimizer = fl.optim.create("kfac", model)
torch.nn.CrossEntropyLoss()(model(batch[0]), batch[1]).backward()
optimizer.step()
assert calls == [], calls
"""
    )


def test_a_command_keeps_memory_in_its_own_process_and_leaves_the_arenas() -> None:
    run(
        COUNTED
        + """
import sys
from fisherlab import cli
sys.argv = ["fisherlab", "--version"]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
ARENA_TEST, ARENA_MAX = -7, -8
assert calls and not {ARENA_TEST, ARENA_MAX} & {option for option, _ in calls}, calls
"""
    )


def test_threads_have_as_many_heaps_after_a_comparison_as_without() -> None:
    count = """
import ctypes, os, tempfile, threading
def arenas():
    library = ctypes.CDLL(None)
    library.fopen.restype = ctypes.c_void_p
    path = tempfile.mkstemp()[1]
    file = library.fopen(path.encode(), b"w")
    library.malloc_info(0, ctypes.c_void_p(file))
    library.fclose(ctypes.c_void_p(file))
    with open(path) as text:
        found = text.read().count("<heap nr=")
    os.unlink(path)
    return found
def used():
    kept = [bytearray(200) for _ in range(1000)]
    started.wait()
    ended.wait()
    del kept
started, ended = threading.Barrier(7), threading.Barrier(7)
threads = [threading.Thread(target=used) for _ in range(6)]
"""
    run(
        COUNTED.replace("heap._glibc = lambda: Library()", "")
        + count
        + """
fl.compare(model, torch.nn.CrossEntropyLoss(), *batch, approximations=["kfac"])
for thread in threads:
    thread.start()
started.wait()
found = arenas()
ended.wait()
assert found >= min(7, 8 * os.cpu_count()), found
"""
    )


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
