"""Packages that are not installed: what works without them, and what is said of one."""

import os
import subprocess
import sys

import psutil
import pytest

from fisherlab import extras, heap

WITHOUT = """
import sys, warnings
from fisherlab.extras import PACKAGES

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        gone = name.partition(".")[0] in PACKAGES
        return None if gone else self.finder.find_spec(name, *args)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
warnings.simplefilter("error")
import torch
from torch import nn
import fisherlab as fl

def said(call):
    try:
        call()
    except ImportError as error:
        print(error)

for part in (*fl.PARTS, *fl.HOMES):
    said(lambda: getattr(fl, part) and None)
print("parts done")
model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
table = fl.compare(model, nn.CrossEntropyLoss(), x, y, approximations=["kfac", "exact"])
assert float(table.summary()["relative_error"]["exact"]) < 1e-5
optimizer = fl.optim.create("kfac", model)
nn.CrossEntropyLoss()(model(x), y).backward()
optimizer.step()
print("steps done")
said(lambda: fl.datasets.load("digits"))
said(lambda: fl.capture(model, nn.CrossEntropyLoss(), x, y, backend="backpack"))
said(lambda: table.plot("error"))
from fisherlab.__main__ import main
main()
"""


def test_captures_comparisons_and_optimizers_need_four_packages_and_the_rest_is_named(tmp_path):
    place = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # torch's own folder
    words = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(words, env=place, capture_output=True, text=True, check=False)
    plots = "matplotlib is not installed: pip install 'fisherlab[plots]'"
    assert done.stdout.splitlines() == [
        plots,  # fl.plots
        plots,  # fl.reproduce
        "parts done",
        "steps done",
        "sklearn is not installed: pip install 'fisherlab[data]'",
        "backpack is not installed: pip install 'fisherlab[backpack]'",
        plots,
    ], done.stderr
    assert done.stderr == "error: typer is not installed: pip install 'fisherlab[cli]'\n"
    assert done.returncode == 1


def test_a_module_that_is_nobodys_stays_as_it_is():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'nothing_here'$"):
        with extras.named():
            import nothing_here  # noqa: F401


def test_free_memory_is_what_psutil_says():
    ours, theirs = heap.available(), psutil.virtual_memory().available
    assert abs(ours - theirs) < 0.05 * psutil.virtual_memory().total
