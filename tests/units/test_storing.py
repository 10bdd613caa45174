"""`fl.save` and `fl.load`: every number keeps its bits; a damaged or foreign file is refused."""

from dataclasses import fields, is_dataclass

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.storing import StoredError


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    return model, torch.randn(5, 1, 4, 4), torch.randint(0, 3, (5,))


def same(a, b):
    """Whether two values are equal to the bit, types and all."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        bits = [x.detach().reshape(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        rest = [vars(x) for x in (a, b) if isinstance(x, fl.extract.Captures)]
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a) and (not rest or same(*rest))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b or (a != a and b != b)


@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
def test_captures_come_back_to_the_bit_and_give_the_same_table(batch, fisher_type, tmp_path):
    model, x, y = batch
    options = {"generator": torch.Generator().manual_seed(0)} if fisher_type == "mc" else {}
    captures = fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type=fisher_type, **options)
    path = fl.save(captures, tmp_path / "batch.safetensors")
    again = fl.load(path)
    assert same(dict(captures), dict(again)) and same(captures, again)
    assert repr(again) == repr(captures)
    for name, layer in captures.items():
        for method in (fl.KFAC(), fl.Exact()):
            ours, theirs = method(layer), method(again[name])
            assert torch.equal(ours.dense(), theirs.dense())
    # one layer, and what the two gradients share is written once
    layer = captures["3"]
    alone = fl.load(fl.save(layer, tmp_path / "layer"))
    assert same(layer, alone)
    size = sum(t.numel() * t.element_size() for t in safetensors.torch.load_file(path).values())
    assert path.stat().st_size < size + 20_000


def test_every_approximation_comes_back_to_the_bit(batch, tmp_path):
    model, x, y = batch
    captures = fl.capture(model, nn.CrossEntropyLoss(), x, y)
    made, left = {}, []
    for name in fl.approximations.names():
        try:
            made[name] = fl.approximations.get(name)()(captures["3"])
        except (fl.blocks.BlockError, fl.CaptureError):
            left.append(name)  # of a pair of batches, or of a running mean
    assert set(left) <= {"kbfgs"} and len(made) > 12
    again = fl.load(fl.save(made, tmp_path / "blocks.safetensors"))
    V = torch.randn(3, 33)
    for name, block in made.items():
        assert torch.equal(block.dense(), again[name].dense()), name
        assert same(fl.blocks.to_dict(block), fl.blocks.to_dict(again[name])), name
        # a factor's thin basis is made anew from its matrix
        ours, theirs = block.solve(V, 0.1), again[name].solve(V, 0.1)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_table_comes_back(batch, tmp_path):
    model, x, y = batch
    table = fl.compare(model, nn.CrossEntropyLoss(), x, y, approximations=["kfac"])
    again = fl.load(fl.save(table, tmp_path / "table"))
    pd.testing.assert_frame_equal(again.frame, table.frame, check_exact=True)


WRONG = [3, [nn.Linear(2, 2)], {1: torch.ones(2)}, np.ones(3), {"a": {"b": object()}}]


@pytest.mark.parametrize("value", WRONG[1:], ids=lambda v: type(v).__name__)
def test_what_cannot_be_stored_is_refused_and_nothing_written(value, tmp_path):
    with pytest.raises(StoredError, match=r"the value.* is .*; fl\.save takes"):
        fl.save(value, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_foreign_file_is_refused_by_name(batch, tmp_path):
    model, x, y = batch
    path = fl.save(fl.capture(model, nn.CrossEntropyLoss(), x, y), tmp_path / "file")
    good = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in (*generator.integers(0, len(good), 60), 0, 9, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(bad)
        with pytest.raises(StoredError, match=r"file is (damaged|no file of fl\.save)"):
            fl.load(path)
    for bad in (good[:-3], good[: len(good) // 2], b"", b"junk" * 50):
        path.write_bytes(bad)
        with pytest.raises(StoredError, match="file is damaged"):
            fl.load(path)
    path.write_bytes(safetensors.torch.save({"0": torch.ones(2)}))
    with pytest.raises(StoredError, match=r"no file of fl\.save"):
        fl.load(path)
    torch.save({"0": torch.ones(2)}, path)
    with pytest.raises(StoredError, match="file is damaged"):
        fl.load(path)
    with pytest.raises(FileNotFoundError):
        fl.load(tmp_path / "nothing")
    with pytest.raises(StoredError, match="is a folder"):
        fl.save(torch.ones(2), tmp_path)
