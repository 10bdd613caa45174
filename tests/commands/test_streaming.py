"""References of a whole data set: Gram matrices in tiles, the same numbers; budgets that say so."""

from dataclasses import dataclass

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherlab as fl
from fisherlab import metrics
from fisherlab.blocks import BlockTooLarge, DirectSum, Outer, contractions, numerics
from fisherlab.statistics import InputMoment


def columns(n, m=2, t=3, o=3, i=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, t, i, generator=generator, dtype=torch.float64)
    return a, torch.randn(m, n, t, o, generator=generator, dtype=torch.float64)


@pytest.fixture
def small(monkeypatch):
    """A workspace of 9 x 9 entries of a Gram matrix; no larger Gram matrix may be made."""
    monkeypatch.setattr(contractions, "WORKSPACE", 8 * 81)
    monkeypatch.setattr(numerics, "GRANTED", 8 * 81)
    monkeypatch.setattr(numerics, "gram_budget", lambda device: 8 * 81)


def dense_pairs(block):
    """`<F_n, F_k>` from dense per-example blocks."""
    m, n = block.g.shape[:2]
    D = contractions.per_example(block.a, block.g).reshape(m, n, -1)
    F = torch.einsum("mnp,mnq->npq", D, D)
    return torch.einsum("npq,kpq->nk", F, F)


def test_tiles_are_the_upper_triangle_of_the_gram_matrix(small):
    block = Outer(*columns(11))
    m, n = 2, 11
    K = contractions.gram(block.a, block.g).view(m, n, m, n)
    seen = torch.zeros(n, n)
    for p, q, tile in block.columns.gram_tiles():
        assert tile.numel() <= 81
        torch.testing.assert_close(tile, K[:, p][..., q], rtol=1e-12, atol=1e-12)
        seen[p, q] += 1
        if p != q:
            seen[q, p] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("n", [3, 11, 16])
def test_pair_sums_in_tiles_are_those_of_dense_blocks(small, n):
    block = Outer(*columns(n))
    pairs = dense_pairs(block)
    rows, own = block.columns.pair_sums
    torch.testing.assert_close(rows, pairs.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(own, pairs.diagonal(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("grouped", [False, True])
def test_population_error_in_tiles_is_its_dense_definition(small, grouped, monkeypatch):
    parts = [Outer(*columns(31, seed=s)) for s in range(1 + grouped)]
    pairs = torch.stack([dense_pairs(part) for part in parts]).sum(0)
    M = len(pairs)
    norm = (pairs.sum() - pairs.trace()) / (M * (M - 1))
    # an approximation made of other examples
    makers = [Outer(*columns(5, seed=9 + s)).dense() for s in range(1 + grouped)]
    blocks = [fl.blocks.Dense(X, part.shape) for X, part in zip(makers, parts, strict=True)]
    dense = [dense_mean(part) for part in parts]
    product = sum((X * F).sum() for X, F in zip(makers, dense, strict=True))
    expected = sum(X.square().sum() for X in makers) - 2 * product + norm
    X, F = (DirectSum(blocks), DirectSum(parts)) if grouped else (blocks[0], parts[0])
    found = metrics.population_estimate(X, F)
    torch.testing.assert_close(found.squared, expected, rtol=1e-12, atol=1e-12 * float(norm))
    # at once, without tiles
    monkeypatch.undo()
    fresh = [Outer(part.a, part.g) for part in parts]
    whole = metrics.population_estimate(X, DirectSum(fresh) if grouped else fresh[0])
    assert found.low >= 0 and found.high > found.low
    for name in ("error", "error_se", "low", "high"):
        one, other = getattr(found, name), getattr(whole, name)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(metrics.population_norm(F), norm.sqrt(), rtol=1e-12, atol=0)


POPULATION = [f"population_error{end}" for end in ("", "_se", "_low", "_high")]


def dense_mean(block):
    D = contractions.per_example(block.a, block.g).flatten(0, 1).flatten(1)
    return D.mT @ D / len(block.a)


@pytest.mark.parametrize("grouped", [False, True])
def test_diagonal_share_is_the_share_of_the_squared_norm(small, grouped):
    parts = [Outer(*columns(12, seed=s)) for s in range(1 + grouped)]
    pairs = torch.stack([dense_pairs(part) for part in parts]).sum(0)
    expected = pairs.trace() / pairs.sum()
    F = DirectSum(parts) if grouped else parts[0]
    torch.testing.assert_close(metrics.diagonal_share(F), expected, rtol=1e-12, atol=0)


def test_norms_and_products_past_the_budget_of_a_gram_matrix(small):
    F, G = Outer(*columns(12)), Outer(*columns(15, seed=3), shift=0.5)
    assert F.num_columns**2 > 81
    torch.testing.assert_close(F.squared_norm(), dense_mean(F).square().sum(), rtol=1e-12, atol=0)
    shifted = dense_mean(G) + 0.5 * torch.eye(G.size, dtype=torch.float64)
    torch.testing.assert_close(G.squared_norm(), shifted.square().sum(), rtol=1e-12, atol=0)
    expected = (dense_mean(F) * shifted).sum()
    torch.testing.assert_close(F.inner(G), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(G.inner(F), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(F.inner(F), dense_mean(F).square().sum(), rtol=1e-12, atol=0)


def test_a_gram_matrix_past_its_budget_says_what_it_needs(small):
    F = Outer(*columns(12))
    with pytest.raises(BlockTooLarge, match="Gram matrix of 24 output vectors would take"):
        F.gram()
    with pytest.raises(BlockTooLarge, match="pass the whole data set as `reference=`"):
        F.power(-1, 0.1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def test_a_loader_as_reference_is_its_examples_at_once(monkeypatch):
    unseen = data(30, 1)
    options = {"approximations": ["kfac", "ekfac"], "fisher_type": "exact"}
    whole = fl.compare(net(), nn.CrossEntropyLoss(), *data(8), reference=unseen, **options)
    monkeypatch.setattr(contractions, "WORKSPACE", 8 * 400)
    loader = DataLoader(TensorDataset(*unseen), batch_size=7)
    parts = fl.compare(net(), nn.CrossEntropyLoss(), *data(8), reference=loader, **options)
    assert whole.frame["population_error"].notna().any()
    for column in (*POPULATION, "diagonal_share", "relative_error"):
        one, other = parts.frame[column], whole.frame[column]
        pd.testing.assert_series_equal(one, other, rtol=1e-11, atol=1e-12)
    assert (parts.frame["reference_examples"] == 30).all()


def test_captures_can_be_the_reference():
    model, criterion, unseen = net(), nn.CrossEntropyLoss(), data(60, 1)
    options = {"approximations": ["kfac"], "fisher_type": "exact"}
    once = fl.capture(model, criterion, *unseen, fisher_type="exact")
    one = fl.compare(model, criterion, *data(8), reference=once, **options).frame
    two = fl.compare(model, criterion, *data(8), reference=unseen, **options).frame
    assert one["population_error_low"].notna().all()
    pd.testing.assert_frame_equal(one[POPULATION], two[POPULATION], rtol=0, atol=0)


def test_a_data_set_past_the_gram_budget_is_measured_without_solves(monkeypatch):
    sample = data(40)
    options = {"approximations": ["kfac", "ekfac"], "fisher_type": "exact", "dampings": (0.1,)}
    whole = fl.compare(net(), nn.CrossEntropyLoss(), *sample, **options).frame
    monkeypatch.setattr(contractions, "WORKSPACE", 8 * 400)
    monkeypatch.setattr(numerics, "GRANTED", 8 * 400)
    monkeypatch.setattr(numerics, "gram_budget", lambda device: 8 * 400)
    loader = DataLoader(TensorDataset(*sample), batch_size=16)
    parts = fl.compare(net(), nn.CrossEntropyLoss(), loader, **options).frame
    for column in ("relative_error", "trace_ratio", "cosine", "diagonal_share"):
        assert (parts[column] - whole[column]).abs().max() <= 1e-12, column
    assert parts["note"].str.contains("Gram matrix of 120 output vectors").all()
    assert parts["direction_cosine"].isna().all() and whole["direction_cosine"].notna().all()


# Batches of other kinds


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, features):
        return self.net(features)


def test_dict_batches_carry_their_labels():
    x, y = data(8)
    model, criterion = Keywords(), nn.CrossEntropyLoss()
    one = fl.capture(model, criterion, {"features": x, "labels": y})
    two = fl.capture(model, criterion, x, y)
    assert torch.equal(one["net.0"].inputs, two["net.0"].inputs)
    assert torch.equal(one["net.0"].output_gradients, two["net.0"].output_gradients)
    loader = [{"features": x[k : k + 4], "labels": y[k : k + 4]} for k in (0, 4)]
    options = {"approximations": ["kfac"]}
    frame = fl.compare(model, criterion, loader, reference=loader, **options).frame
    expected = fl.compare(model, criterion, x, y, **options).frame
    assert (frame["relative_error"] - expected["relative_error"]).abs().max() < 1e-12
    with pytest.raises(fl.CaptureError, match="labels under one of labels, label"):
        fl.capture(model, criterion, {"features": x})


def test_forward_calls_a_model_in_its_own_way():
    x, y = data(8)

    def forward(model, batch):
        return model(batch["a"] + batch["b"])

    batch = {"a": x, "b": torch.zeros_like(x), "labels": y}
    one = fl.capture(net(), nn.CrossEntropyLoss(), batch, forward=forward)
    two = fl.capture(net(), nn.CrossEntropyLoss(), x, y)
    assert torch.equal(one["2"].output_gradients, two["2"].output_gradients)
    frame = fl.compare(
        net(), nn.CrossEntropyLoss(), batch, forward=forward, approximations=["kfac"]
    ).frame
    assert set(frame["fisher_type"]) == {"exact"} and len(frame) == 4


def test_missing_labels_are_asked_for():
    with pytest.raises(fl.CaptureError, match="labels are missing: pass y"):
        fl.capture(net(), nn.CrossEntropyLoss(), data(8)[0])


# Budgets


def test_a_budget_that_cannot_be_met_names_the_layer_and_what_it_needs():
    needed = 8 * (4 + 1 + 5)  # one example's input with its 1 and one output vector
    with pytest.raises(fl.CaptureError, match=rf"layer '0' needs {needed} for one output") as told:
        fl.compare(net(), nn.CrossEntropyLoss(), *data(8), approximations=["kfac"], memory=70)
    assert "2 of 2 layers" in str(told.value) and f"raise `memory` to {needed}" in str(told.value)
    frame = fl.compare(
        net(), nn.CrossEntropyLoss(), *data(8), approximations=["kfac"], memory=needed
    ).frame
    whole = fl.compare(net(), nn.CrossEntropyLoss(), *data(8), approximations=["kfac"]).frame
    assert (frame["relative_error"] - whole["relative_error"]).abs().max() < 1e-12


@dataclass(frozen=True)
class Hungry(InputMoment):
    """KFAC's inputs on a device with room for a few examples."""

    room: int = 3

    def total(self, layer):
        if layer.raw_inputs[0].shape[0] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().total(layer)


def test_out_of_memory_halves_the_chunk_and_goes_on():
    model, criterion, sample = net(), nn.CrossEntropyLoss(), data(8)
    before = contractions.WORKSPACE
    makers = {"hungry": fl.KFAC(A=Hungry()), "kfac": fl.KFAC()}
    frame = fl.compare(model, criterion, *sample, approximations=makers).frame
    hungry, plain = (frame[frame["approximation"] == name].reset_index() for name in makers)
    assert (hungry["relative_error"] - plain["relative_error"]).abs().max() < 1e-12
    assert (hungry["note"] == "").all()
    assert contractions.WORKSPACE == before


def test_out_of_memory_at_one_example_is_a_row_that_says_so():
    makers = {"starving": fl.KFAC(A=Hungry(room=0)), "kfac": fl.KFAC()}
    frame = fl.compare(net(), nn.CrossEntropyLoss(), *data(8), approximations=makers).frame
    starving = frame[frame["approximation"] == "starving"]
    assert starving["relative_error"].isna().all()
    assert starving["note"].str.contains("out of memory even in chunks of one example").all()
    assert starving["note"].str.contains("Tried to allocate 20.00 GiB").all()
    assert frame[frame["approximation"] == "kfac"]["relative_error"].notna().all()


class Narrow(nn.Module):
    """A model on a device with room for 3 examples."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        if torch.is_grad_enabled() and len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.net(x)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_capture_that_does_not_fit_is_made_in_halves(kind):
    x, y = data(9)
    options = {"approximations": ["kfac", "tekfac"], "fisher_type": kind, "dampings": (0.1,)}
    parts = fl.compare(Narrow(), nn.CrossEntropyLoss(), x, y, **options).frame
    whole = fl.compare(net(), nn.CrossEntropyLoss(), x, y, **options).frame
    for column in ("relative_error", "trace_ratio", "direction_cosine"):
        assert (parts[column] - whole[column]).abs().max() < 1e-10, column


def test_halves_with_other_numbers_of_loss_terms_are_refused():
    x, y = data(8)
    y[0] = -100
    with pytest.raises(fl.CaptureError, match="8 examples ran out of memory .* loader of smaller"):
        fl.compare(Narrow(), nn.CrossEntropyLoss(), x, y, approximations=["kfac"])


# Errors against the batch size


def test_error_curve_is_the_comparison_at_each_size():
    from fisherlab.experiments.streaming import error_curve

    model, criterion, sample, unseen = net(), nn.CrossEntropyLoss(), data(40), data(100, 1)
    frame = error_curve(
        model,
        criterion,
        *sample,
        reference=DataLoader(TensorDataset(*unseen), batch_size=25),
        sizes=(4, 40),
        approximations=["kfac", "tekfac"],
        repeats=2,
    )
    assert len(frame) == 2 * 2 * 2 * 2 and set(frame["examples"]) == {4, 40}
    assert (frame["reference_examples"] == 100).all()
    # a batch of everything is the same sample whatever its order
    expected = fl.compare(
        model, criterion, *sample, reference=unseen, approximations=["kfac", "tekfac"]
    ).frame.drop_duplicates(["layer", "approximation"])
    index = ["layer", "approximation"]
    for seed in (0, 1):
        ours = frame[(frame["examples"] == 40) & (frame["seed"] == seed)].set_index(index)
        columns = ["relative_error", *POPULATION]
        theirs = expected.set_index(index)[columns]
        assert theirs["population_error"].notna().any()
        pd.testing.assert_frame_equal(ours[columns], theirs, rtol=1e-10, check_like=True)
    small = frame[(frame["examples"] == 4) & frame["population_error"].notna()]
    # a small batch flatters: its error in sample is not that on the population
    assert len(small) and (small["population_error"] > small["relative_error"]).all()
    missing = frame["population_error"].isna()
    assert (frame["note"].str.contains("too few unseen examples") == missing).all()


def test_error_curve_puts_examples_aside_and_can_be_drawn():
    from fisherlab.experiments.streaming import error_curve

    frame = error_curve(
        net(), nn.CrossEntropyLoss(), *data(60), sizes=(4, 8), approximations=["kfac"], repeats=1
    )
    assert (frame["reference_examples"] == 30).all()
    figure = fl.plots.in_sample_against_population(frame)
    assert len(figure.axes[0].get_lines()) == 2
    with pytest.raises(ValueError, match="the 30 examples that batches are drawn from"):
        error_curve(net(), nn.CrossEntropyLoss(), *data(60), sizes=(31,))
