"""`compare`: its columns, what it takes, what it refuses, and that the work is done once."""

import copy
import math
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from references import Reference, randn
from torch import nn

import fisherlab as fl
from fisherlab import blocks, comparison
from fisherlab.blocks import BlockError, BlockTooLarge, columns, mini_block, roots, work
from fisherlab.comparison import Interrupted, pool
from fisherlab.comparison.measurement import LayerMeasurement
from fisherlab.statistics import GroupedMoment, InputMoment, LeftMoment

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
COLUMNS = """layer layer_type n_parameters approximation fisher_type examples reference_examples
reference_fisher_type seed step dtype damping damping_relative placement relative_error
population_error population_error_se population_error_low population_error_high
population_cosine population_cosine_low population_cosine_high population_trace_ratio
population_trace_ratio_low population_trace_ratio_high diagonal_share
optimality_gap trace_ratio cosine scaled_error
diagonalisation subspace_overlap direction_cosine direction_error quadratic_decrease
quadratic_decrease_scaled stein_loss condition build_seconds decompose_seconds shared_seconds
solve_seconds memory_bytes formed_bytes clamped"""
TIMES = ["build_seconds", "decompose_seconds", "shared_seconds", "solve_seconds"]


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 2, stride=2), nn.Tanh(), nn.Conv2d(2, 2, 1, groups=2)]
    layers += [nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).double()
    model(randn(9, 1, 4, 4, seed=8))  # running statistics of its own
    return model.eval()


def batch(n=12, seed=0):
    return randn(n, 1, 4, 4, seed=seed), torch.arange(n) % 3


def compared(*args, **options):
    return fl.compare(net(), CE, *(args or batch()), **options)


def row(table, **where):
    frame = table.frame
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def same(one, two, rtol=1e-12, but=()):
    left, right = (table.frame.drop(columns=[*TIMES, *but]) for table in (one, two))
    pd.testing.assert_frame_equal(left, right, rtol=rtol, atol=1e-8)


def test_the_columns_and_one_row_per_layer_approximation_and_damping():
    table = compared()
    assert list(table.frame.columns) == [*COLUMNS.split(), "note"]
    names = set(fl.approximations.names()) - {"kbfgs"}
    assert set(table.frame["approximation"]) == names
    assert len(table.frame) == 3 * len(names) * 2
    assert not table.frame.duplicated(["layer", "approximation", "damping_relative"]).any()
    types = table.frame.groupby("layer")["layer_type"].first()
    assert dict(types) == {"0": "Conv2d", "2": "Conv2d", "6": "Linear"}
    exact = table.frame[table.frame["approximation"] == "exact"]
    for column, value in (("relative_error", 0), ("trace_ratio", 1), ("cosine", 1),
                          ("direction_cosine", 1), ("direction_error", 0), ("stein_loss", 0),
                          ("condition", 1), ("quadratic_decrease", 1)):  # fmt: skip
        assert np.allclose(exact[column], value, atol=1e-8), column
    assert (table.frame["optimality_gap"].notna()).all()
    assert table.frame["reference_examples"].isna().all()
    assert table.frame["population_error"].isna().all()


def test_every_number_is_that_of_the_dense_block():
    model, (x, y) = net(), batch()
    table = fl.compare(model, CE, x, y, approximations=["kfac", "tekfac"], dampings=[0.05])
    for name in ("0", "6"):
        layer = model.get_submodule(name)
        reference = Reference(model, CE, x, y, layer.weight, layer.bias)
        F, g = reference.exact(), reference.gradients().mean(0)
        damping = 0.05 * float(F.trace()) / len(F)
        eye = damping * torch.eye(len(F)).double()
        for approximation in ("kfac", "tekfac"):
            captured = fl.capture(model, CE, x, y)[name]
            X = fl.approximations.get(approximation)()(captured).dense()
            found = row(table, layer=name, approximation=approximation)
            d, best = torch.linalg.solve(X + eye, g), torch.linalg.solve(F + eye, g)
            expected = {
                "n_parameters": len(F),
                "damping": damping,
                "relative_error": (X - F).norm() / F.norm(),
                "trace_ratio": X.trace() / F.trace(),
                "cosine": (X * F).sum() / X.norm() / F.norm(),
                "direction_cosine": d @ best / d.norm() / best.norm(),
                "direction_error": (d - best).norm() / best.norm(),
            }
            for column, value in expected.items():
                assert found[column] == pytest.approx(float(value), rel=1e-8), column


def test_a_layer_in_groups_is_the_direct_sum_of_its_groups():
    model, (x, y) = net(), batch()
    captured = fl.capture(model, CE, x, y)
    pairs = [(fl.KFAC()(captured[f"2:{k}"]), fl.Exact()(captured[f"2:{k}"])) for k in range(2)]
    X, F = (torch.block_diag(*(b.dense() for b in side)) for side in zip(*pairs, strict=True))
    found = row(compared(approximations=["kfac"], dampings=[0.1]), layer="2")
    assert found["n_parameters"] == len(F)
    assert found["relative_error"] == pytest.approx(float((X - F).norm() / F.norm()), rel=1e-8)
    assert found["trace_ratio"] == pytest.approx(float(X.trace() / F.trace()), rel=1e-10)


def test_names_instances_blocks_and_callables():
    model, (x, y) = net(), batch()
    captured = fl.capture(model, CE, x, y)
    block = fl.TKFAC()(captured["6"])
    table = fl.compare(
        model, CE, x, y, dampings=[0.1],
        approximations={
            "by name": fl.approximations.get("tkfac")(),
            "block": block,
            "callable": lambda layer: fl.TKFAC()(layer),
            "dict": {"6": block},
            "factored": fl.KFAC(placement="factored"),
        },
    )  # fmt: skip
    errors = [
        row(table, layer="6", approximation=name)["relative_error"]
        for name in ("by name", "block", "callable", "dict")
    ]
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-12)
    assert set(table.frame[table.frame["approximation"] == "block"]["layer"]) == {"6"}
    assert row(table, layer="6", approximation="factored")["placement"] == "factored"
    two = fl.compare(model, CE, x, y, approximations=[fl.KFAC(), fl.KFAC(placement="factored")])
    assert two.frame["approximation"].nunique() == 2
    # what an optimizer hands out, as it is; and one block under a name of one's own
    whole = fl.compare(
        model, CE, x, y, approximations={k: fl.KFAC()(v) for k, v in captured.items()}
    )
    assert set(whole.frame["approximation"]) == {"preconditioner"}
    assert set(whole.frame["layer"]) == {"0", "2", "6"}
    alone = fl.compare(model, CE, x, y, approximations={"mine": block})
    assert set(alone.frame["approximation"]) == {"mine"}


def test_a_new_approximation_appears_by_itself():
    from dataclasses import dataclass

    from fisherlab.approximations import base

    try:

        @dataclass(frozen=True)
        class Toy(fl.KFAC, name="toy"):
            def block(self, mean, shape):
                return blocks.Kronecker(mean(self.G), mean(self.A).diagonal().diag())

        assert "toy" in set(compared(dampings=[0.1]).frame["approximation"])
    finally:
        base._REGISTRY.pop("toy", None)


def test_batches_of_a_loader_are_one_sample():
    x, y = batch(12)
    loader = [(x[:5], y[:5]), (x[5:], y[5:])]
    # one whole batch may be kept in a thinner form
    same(compared(loader), compared(x, y), rtol=1e-8, but=["memory_bytes"])
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    same(compared(data), compared(x, y), rtol=1e-8, but=["memory_bytes"])


def wide():
    """A convolution and a linear map with more inputs than a batch of five spans, a narrow one."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(5, 2, 3, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 6), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(6, 4)).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
def test_few_inputs_are_measured_in_their_own_coordinates(dtype, fisher_type, monkeypatch):
    x, y = randn(5, 5, 6, 6, seed=3).to(dtype), torch.arange(5) % 4
    approximations = {name: fl.approximations.get(name)() for name in fl.approximations.names()}
    del approximations["kbfgs"]  # a pair of batches
    approximations |= {"factored": fl.KFAC(placement="factored")}
    found = []
    frames = []
    inside = comparison.reference.ExactReference.inside
    for patched in (lambda frame: frames.append(inside(frame)) or frames[-1], lambda frame: None):
        monkeypatch.setattr(comparison.reference.ExactReference, "inside", patched)
        options = {"approximations": approximations, "fisher_type": fisher_type}
        found.append(fl.compare(wide().to(dtype), CE, x, y, dampings=[1e-3, 1.0], **options))
    assert [frame is not None for frame in frames] == [True, True, False]
    left, right = (table.frame.drop(columns=TIMES) for table in found)
    tolerance = 1e-7
    if dtype == torch.float32:
        # without those that divide by a damping far below the rounding of the largest eigenvalue
        tolerance, known = 1e-4, ["relative_error", "trace_ratio", "cosine", "diagonalisation"]
        left, right = left[known], right[known]
    pd.testing.assert_frame_equal(left, right, rtol=tolerance, atol=tolerance)


def test_mini_blocks_of_few_inputs_are_never_formed(monkeypatch):
    """120 blocks of 2049 x 2049 took three minutes where 32 examples make them 33 x 33."""
    monkeypatch.setattr(mini_block, "dense_budget", lambda device: 8 * 20 * 6**2)
    model = nn.Sequential(nn.Linear(50, 20)).double()
    x, y = randn(5, 50, seed=3), torch.arange(5)
    table = fl.compare(model, CE, x, y, approximations=["mini_block"])
    assert (table.frame["note"] == "").all() and table.frame["stein_loss"].notna().all()
    X = fl.MiniBlock()(fl.capture(model, CE, x, y)["0"])
    with pytest.raises(BlockTooLarge, match="20 x 1 mini-blocks of 51 x 51"):
        X.power(-1, 1.0)
    # an optimizer's are those of the whole space
    with pytest.raises(BlockTooLarge, match="layer '0'"):
        GroupedMoment().total(fl.capture(model, CE, x, y)["0"])


def test_a_memory_budget_changes_nothing_but_the_memory():
    table = compared(memory=2000)
    same(table, compared(), rtol=1e-8, but=["memory_bytes"])


def test_a_reference_of_unseen_examples():
    unseen = batch(30, seed=5)
    table = compared(reference=unseen, dampings=[0.1])
    model, (x, y) = net(), batch()
    F = fl.Exact()(fl.capture(model, CE, *unseen)["6"])
    X = fl.EKFAC()(fl.capture(model, CE, x, y)["6"])
    found = row(table, layer="6", approximation="ekfac")
    expected, spread = fl.metrics.population_error(X, F)
    assert found["population_error"] == pytest.approx(float(expected), rel=1e-10)
    assert found["population_error_se"] == pytest.approx(float(spread), rel=1e-10)
    assert found["reference_examples"] == 30
    assert found["examples"] == 12
    assert found["diagonal_share"] == pytest.approx(float(fl.metrics.diagonal_share(F)), rel=1e-10)
    again = compared(reference=[(unseen[0][:11], unseen[1][:11]), (unseen[0][11:], unseen[1][11:])],
                     dampings=[0.1])  # fmt: skip
    same(table, again, rtol=1e-8)
    assert table.leading == ("population_error" if table.noisy else "relative_error")
    assert table.summary().columns[0] == table.leading


def test_a_reference_of_another_fisher_type():
    table = compared(fisher_type="mc", reference="exact", approximations=["exact", "tkfac"],
                     dampings=[0.1])  # fmt: skip
    assert set(table.frame["fisher_type"]) == {"mc"}
    assert set(table.frame["reference_fisher_type"]) == {"exact"}
    model, (x, y) = net(), batch()
    drawn = fl.Exact()(fl.capture(model, CE, x, y, fisher_type="mc")["6"]).dense()
    F = fl.Exact()(fl.capture(model, CE, x, y)["6"]).dense()
    found = row(table, layer="6", approximation="exact")
    assert found["relative_error"] == pytest.approx(float((drawn - F).norm() / F.norm()), rel=1e-8)


def test_the_default_fisher_type_is_exact_up_to_twenty_outputs():
    for outputs, expected in ((20, "exact"), (21, "mc")):
        model = nn.Sequential(nn.Linear(2, outputs)).double()
        table = fl.compare(model, CE, randn(3, 2), torch.arange(3), approximations=["kfac"])
        assert set(table.frame["fisher_type"]) == {expected}
    model = nn.Sequential(nn.Linear(2, 3)).double()
    table = fl.compare(model, nn.HuberLoss(), randn(3, 2), randn(3, 3), approximations=["kfac"])
    assert set(table.frame["fisher_type"]) == {"empirical"}


def test_mc_is_the_generators_and_leaves_the_global_stream_alone():
    model = net()

    def run(seed):
        options = {"generator": torch.Generator().manual_seed(seed), "approximations": ["kfac"]}
        return fl.compare(model, CE, *batch(), fisher_type="mc", **options)

    before = torch.get_rng_state()
    same(run(3), run(3))
    assert torch.equal(before, torch.get_rng_state())
    assert set(run(3).frame["seed"]) == {3}
    assert not run(4).frame["relative_error"].equals(run(3).frame["relative_error"])


def test_the_model_comes_back_untouched():
    model, (x, y) = net(), batch()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    fl.compare(model, CE, x, y, reference=batch(5, seed=2))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not model.training
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks)
        assert not any("input0" in name or "backpack" in name for name in vars(module))


def test_the_memo_does_each_piece_of_work_once(monkeypatch):
    calls = {}

    def count(owner, name):
        original = getattr(owner, name)

        def counted(self, *args):
            calls.setdefault((owner.__name__, name), []).append(self)
            return original(self, *args)

        monkeypatch.setattr(owner, name, counted)

    # thin views are asked for first
    count(InputMoment, "rows")
    count(LeftMoment, "rows")
    count(fl.EigenCorrected, "corrections")
    decomposed, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda S: decomposed.append(tuple(S.shape)) or eigh(S)
    )
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    names = ["kfac", "ekfac", "tkfac", "tekfac", "shampoo"]
    fl.compare(model, CE, randn(20, 5), torch.arange(20) % 3, approximations=names, layers=["0"])
    assert len(calls[("InputMoment", "rows")]) == 1
    assert len(calls[("LeftMoment", "rows")]) == 1
    assert len(calls[("EigenCorrected", "corrections")]) == 2
    # G and A of KFAC, left and right of TKFAC, and once the exact block's range
    assert sorted(decomposed)[:4] == [(4, 4), (4, 4), (6, 6), (6, 6)]
    assert len(decomposed) == 5


# --- what it is kept in ---------------------------------------------------------------------------


def test_save_load_and_concat(tmp_path):
    table = compared(step=0)
    folder = table.save(tmp_path / "run")
    assert sorted(p.name for p in folder.iterdir()) == [
        "comparison.csv", "comparison.parquet", "config.json",
    ]  # fmt: skip
    again = fl.Comparison.load(folder)
    pd.testing.assert_frame_equal(table.frame, again.frame)
    assert again.config["fisher_type"] == "exact"
    csv = pd.read_csv(folder / "comparison.csv", dtype={"layer": str})
    assert np.allclose(csv["relative_error"], table.frame["relative_error"])
    both = fl.Comparison.concat([table, compared(step=5)])
    assert len(both.frame) == 2 * len(table.frame)
    assert set(both.frame["step"]) == {0, 5}
    assert (both.summary()["relative_error"] == table.summary()["relative_error"]).all()


class Partly(nn.Module):
    """A tied pair, a frozen layer, an embedding, a normalisation and a convolution in groups."""

    def __init__(self, outputs=3):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(6))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.grouped = nn.Conv1d(4, 2, 1, groups=2)
        self.head = nn.Linear(6, outputs)

    def forward(self, tokens):
        h = self.two(self.one(self.embedding(tokens)).tanh())
        for norm in self.norms:
            h = norm(h)
        return self.head(self.grouped(self.frozen(h).transpose(1, 2)).flatten(1))


def partly(outputs=3, **options):
    torch.manual_seed(0)
    model, y = Partly(outputs).double(), torch.tensor([0, 1, 2, 1])
    x = torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(0))
    return fl.compare(model, CE, x, y, approximations=["kfac"], **options)


def test_the_first_lines_say_what_was_measured():
    table = partly()
    covered = 16 + (2 * 2 + 2) + (3 * 6 + 3)  # the pair once, the groups, the head
    trained = covered + 5 * 4 + 6 * 8
    first, second, third = table.about.split("\n")
    assert first == "Fisher type exact, 4 examples, float64."
    share = f"({covered / trained:.0%})"
    assert second == f"3 layers with {covered} of {trained} trainable parameters {share}."
    asked = "left out unless `layers` names it"
    assert third.startswith(f"Skipped: embedding (it is used by embedding, {asked})")
    assert "; norms.0, norms.1, norms.2, norms.3 and 2 more (it is used by layer_norm" in third
    assert third.endswith("; frozen (its weight is frozen).")
    assert repr(table).startswith(table.about)
    html = table._repr_html_()
    assert html.index("Fisher type exact") < html.index("trainable") < html.index("<table")


def test_more_than_twenty_outputs_are_said_to_be_one_draw():
    by_default = "Above 20 outputs this is the default"
    first = partly(21).about.split("\n")[0]
    assert first.startswith("Fisher type mc with 1 draw per example, 4 examples") and (
        by_default in first
    )
    asked = partly(21, fisher_type="mc", mc_samples=3).about
    assert "mc with 3 draws per example" in asked and by_default not in asked
    assert "draw" not in partly(20).about


def test_the_first_lines_say_what_it_was_measured_against():
    seen = compared(*batch(3), fisher_type="empirical", reference=batch(4, seed=3))
    assert "4 unseen examples for the population error" in seen.about
    other = compared(*batch(3), fisher_type="empirical", reference="exact")
    assert "measured against the exact Fisher of the same examples" in other.about
    assert fl.Comparison(compared().frame).about.startswith("Fisher type exact")  # without config


def test_several_tables_as_one_keep_every_config():
    one, two = partly(step=0), partly(21, step=5, dampings=[1e-3, 1.0])
    for both in (
        fl.Comparison.concat([one, two]),
        fl.Comparison.concat([fl.Comparison.concat([one]), two, one]),
    ):
        assert both.config["step"] == [0, 5] and both.config["dampings"] == [1e-3, 1e-1, 1.0]
        assert both.config["fisher_type"] == ["exact", "mc"]
        assert both.config["skipped"] == one.config["skipped"]
        assert both.config["parameters"]["trained"] == [
            table.config["parameters"]["trained"] for table in (one, two)
        ]
        assert both.config["model"] == "Partly" and "frozen" in both.about
        assert "exact and mc with 1 draw per example" in both.about
    same = fl.Comparison.concat([one, partly(step=7)])
    assert same.config["parameters"] == one.config["parameters"]
    assert same.about == one.about
    assert fl.Comparison.concat([one]).config == one.config


def test_the_summary_says_what_a_noisy_batch_is():
    table = compared(*batch(3), fisher_type="empirical")
    assert table.noisy
    assert "sampling noise" in table.note
    assert "pass `reference=`" in table.note
    torch.manual_seed(0)
    wide, y = nn.Sequential(nn.Linear(40, 3)).double(), torch.arange(40) % 3
    unseen = (randn(40, 40, seed=3), y)
    with_reference = fl.compare(
        wide, CE, randn(3, 40, seed=2), y[:3], fisher_type="empirical", reference=unseen
    )
    assert with_reference.noisy and with_reference.leading == "population_error"
    assert with_reference.frame["population_error"].notna().sum() > len(with_reference.frame) / 2
    assert with_reference.summary()["population_error"].is_monotonic_increasing
    for text in (repr(table), table._repr_html_()):
        assert "tekfac" in text
        assert "sampling noise" in text
    assert "direction_cosine @ 0.001" in table.summary().columns


def test_ctrl_c_hands_over_what_was_measured():
    def stops(names):
        for k, name in enumerate(names):
            if k == 2:
                raise KeyboardInterrupt
            yield name

    with pytest.raises(Interrupted) as stopped:
        compared(approximations=["kfac"], progress=stops)
    assert set(stopped.value.comparison.frame["layer"]) == {"0", "2"}


# --- in float32 ---


def wide_layer(grouped):
    torch.manual_seed(0)
    if grouped:
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(nn.Conv2d(128, 40, 3, groups=2, padding=1), *pooled)
    return nn.Sequential(nn.Linear(600, 100))


@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
@pytest.mark.parametrize("grouped", [False, True])
def test_directions_of_a_wide_layer_in_float32_are_those_of_float64(grouped, fisher_type):
    """1e-3 of the mean eigenvalue is 1e-7 of the largest: rounding of the gradient is as large."""
    x = randn(6, *((128, 2, 2) if grouped else (600,)), seed=1)
    labels = torch.arange(6)
    frames = []
    for dtype in (torch.float64, torch.float32):
        model = wide_layer(grouped).to(dtype)
        names = ["kfac", "ekfac", "diagonal", "eva", "sngd"]
        options = {"approximations": names, "fisher_type": fisher_type, "dampings": (1e-3,)}
        if fisher_type == "mc":
            options["generator"] = torch.Generator().manual_seed(0)
        frames.append(fl.compare(model, CE, x.to(dtype), labels, **options).frame)
    for column in ("direction_cosine", "quadratic_decrease_scaled"):
        assert (frames[0][column] - frames[1][column]).abs().max() < 2e-2, column
    for column in ("direction_error", "stein_loss", "trace_ratio"):
        assert (frames[1][column] / frames[0][column] - 1).abs().max() < 2e-2, column
    # the exact block is itself
    model = wide_layer(grouped).float()
    own = fl.compare(model, CE, x.float(), labels, **(options | {"approximations": ["exact"]}))
    assert (own.frame["direction_error"] == 0).all()


def test_a_table_says_where_its_numbers_need_more_digits():
    class Blurred(blocks.Diagonal):
        trace_below_rounding = 0.25

    makers = {"blurred": lambda layer: Blurred(torch.ones(layer.shape).to(layer.dtype))}
    table = compared(approximations=makers | {"kfac": fl.KFAC()})
    notes = table.frame.groupby("approximation")["note"].unique()
    plain, grouped = sorted(notes["kfac"])
    assert plain == "" and grouped.startswith("a convolution of 2 groups") and ";" not in grouped
    assert "25.0%" in notes["blurred"][0]
    assert "blurred" in table.note and "3 layers" in table.note and "kfac" not in table.note
    table.frame["note"] = table.frame["note"].replace("", None)
    assert "3 layers" in table.note


# --- seconds ---


@pytest.mark.parametrize("order", [1, -1])
def test_seconds_are_a_methods_own_in_any_order(order, monkeypatch):
    """The clock ticks with every eigendecomposition and every Gram matrix."""
    ticks = [0]

    def counted(function):
        def inside(*args):
            ticks[0] += 1
            return function(*args)

        return inside

    monkeypatch.setattr(torch.linalg, "eigh", counted(torch.linalg.eigh))
    monkeypatch.setattr(columns.Columns.gram, "function", counted(columns.Columns.gram.function))
    monkeypatch.setattr(work.time, "perf_counter", lambda: float(ticks[0]))
    model = nn.Linear(40, 3).double()
    names = ["kfac", "ekfac", "tkfac", "tekfac", "shampoo", "diagonal", "exact"][::order]
    made = {"given": blocks.Diagonal(torch.ones(3, 41).double()), "own": lambda layer: OWN(layer)}
    makers = {name: fl.approximations.get(name)() for name in names} | made
    table = fl.compare(model, CE, randn(6, 40), torch.arange(6) % 3, approximations=makers)
    rows = table.frame.drop_duplicates("approximation").set_index("approximation")
    clocks = ["build_seconds", "decompose_seconds", "shared_seconds"]
    for name, expected in {
        "kfac": (0, 2, 2), "tkfac": (0, 2, 2), "ekfac": (2, 0, 2), "tekfac": (2, 0, 2),
        "shampoo": (2, 0, 2), "diagonal": (0, 0, 0), "exact": (0, 1, 0), "own": (0, 2, 0),
    }.items():  # fmt: skip
        assert tuple(rows.loc[name, clocks]) == expected, name
    assert rows.loc["given", clocks].isna().all()


OWN = fl.KFAC()


# --- side by side ---------------------------------------------------------------------------------


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(pool, "HEAVY", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_layers_side_by_side_give_the_same_table(two_threads, monkeypatch):
    threads = set()
    built = LayerMeasurement.build
    monkeypatch.setattr(
        LayerMeasurement,
        "build",
        lambda *args: (
            threads.add((threading.current_thread().name, torch.get_num_threads())) or built(*args)
        ),
    )
    order = []
    together = compared(progress=lambda names: order.extend(names) or names)
    assert {count for _, count in threads} == {1}
    assert len({name for name, _ in threads} - {threading.main_thread().name}) == 2
    # the largest first
    assert order[0] == "6" and set(order) == {"0", "2", "6"}
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    one_by_one = compared()
    same(together, one_by_one)
    assert list(together.frame["layer"].unique()) == ["0", "2", "6"]
    # `memory` bounds one layer at a time
    torch.set_num_threads(2)
    threads.clear()
    compared(memory=2**30)
    assert {name for name, _ in threads} == {threading.main_thread().name}


def test_a_failure_in_one_of_the_threads_ends_the_comparison(two_threads, monkeypatch):
    def broken(layer, maker):
        raise ZeroDivisionError(layer.name)

    monkeypatch.setattr(LayerMeasurement, "build", broken)
    # whichever of the layers in work fails first
    with pytest.raises(ZeroDivisionError, match=r"^[026]$"):
        compared(approximations=["kfac"])


def test_interrupted_side_by_side_it_keeps_what_is_finished_and_starts_no_more(two_threads):
    measured = []

    def measure(name, stopped):
        measured.append(name)
        if name != "quick" and stopped.wait(10):
            raise pool.Stopped
        yield from ()
        return [{"layer": name}]

    costs = {"never": 1.0, "waits": 3.0, "quick": 4.0, "waits too": 2.0}
    with (
        pytest.raises(KeyboardInterrupt),
        pool.LayerPool(measure, costs, torch.device("cpu")) as layers,
    ):
        assert layers.order == ["quick", "waits", "waits too", "never"]
        next(layers.steps())
        raise KeyboardInterrupt
    assert layers.found == {"quick": [{"layer": "quick"}]}
    assert "never" not in measured


def test_light_layers_run_beside_heavy_ones(two_threads, monkeypatch):
    monkeypatch.setattr(pool, "HEAVY", 3.0)
    costs = {"a": 3.0, "light": 1.0, "b": 9.0, "c": 5.0, "lighter": 0.5, "d": 4.0, "last": 2.0}
    order = pool.LayerPool(lambda name, stopped: [], costs, torch.device("cpu")).order
    assert order == ["b", "c", "light", "d", "lighter", "a", "last"]
    # a single heavy one: nothing is gained by threads, and the order stays that of the model
    costs = {"light": 1.0, "b": 9.0}
    assert pool.LayerPool(lambda name, stopped: [], costs, torch.device("cpu")).order == list(costs)


# --- bad input ------------------------------------------------------------------------------------


def with_weight(model, value):
    with torch.no_grad():
        model[6].weight[0, 0] = value
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"approximations": ["kfacc"]}, "no approximation named 'kfacc'; nearest: kfac"),
        ({"approximations": [3]}, "3 .int. among the approximations is neither"),
        ({"fisher_type": "exakt"}, "exakt"),
        ({"reference": "exakt"}, "unknown reference 'exakt'; one of exact"),
        ({"dampings": ()}, "positive, got"),
        ({"dampings": (0.1, -1.0)}, "positive, got"),
        ({"dampings": (math.nan,)}, "positive, got"),
        ({"layers": ["7"]}, "no layer '7' in this model"),
        ({"backend": "jax"}, "jax"),
        ({"approximations": {"a": {"nowhere": None}}}, r"named \['nowhere'\], the layers"),
        (
            {"approximations": {"b": blocks.Diagonal(torch.ones(2, 7).double())}},
            r"block 'b' of shape \(2, 7\) fits no layer",
        ),
        ({"x": torch.full((12, 1, 4, 4), math.nan).double()}, "x has NaN or inf entries"),
        ({"x": torch.zeros(0, 1, 4, 4).double()}, "empty batch"),
        ({"x": randn(11, 1, 4, 4)}, "11"),
        ({"y": torch.full((12,), 3)}, "3"),
        ({"y": torch.full((12,), -1)}, "-1"),
        ({"x": [], "y": None}, "the loader is empty"),
        ({"y": None}, "pass labels y, or a loader"),
        ({"model": with_weight(net(), math.inf)}, "parameter '6.weight' has NaN or inf"),
        ({"model": net().train()}, "'3' is a BatchNorm2d .*model.eval"),
        ({"model": net().half()}, "float16"),
        ({"criterion": nn.HuberLoss(), "fisher_type": "mc", "y": randn(12, 3)}, "HuberLoss"),
        ({"criterion": nn.CrossEntropyLoss(-torch.ones(3).double()), "fisher_type": "exact"},
         "negative weights"),
        ({"memory": 10}, "raise `memory`"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(change, message):
    x, y = batch()
    arguments = {"model": net(), "criterion": CE, "x": x, "y": y, **change}
    with pytest.raises(ValueError, match=message):
        fl.compare(**arguments)


def test_a_block_too_large_for_dense_is_refused_with_its_size(monkeypatch):
    F = fl.Exact()(fl.capture(net(), CE, *batch())["6"])
    monkeypatch.setattr(blocks.numerics, "free_memory", lambda device: 4000)
    message = "27 x 27, 5.43e-06 GiB, over the budget of .* free.*stay matrix-free: `block @ V`"
    with pytest.raises(BlockError, match=message):
        F.dense()


def test_what_an_approximation_must_refuse_is_a_row_with_the_reason():
    def refuses(layer):
        raise BlockError("not this one")

    table = compared(approximations={"refuses": refuses, "kfac": fl.KFAC()})
    refused = table.frame[table.frame["approximation"] == "refuses"]
    assert len(refused) == 6
    assert (refused["note"] == "not this one").all()
    assert refused["relative_error"].isna().all()
    assert table.frame[table.frame["approximation"] == "kfac"]["relative_error"].notna().all()


def test_a_layer_without_gradients_has_a_row_that_says_so():
    model = net()
    with torch.no_grad():
        model[6].weight.zero_()
    x, y = batch()
    table = fl.compare(model, CE, x, y)
    dead = table.frame[table.frame["layer"] == "0"]
    assert dead["note"].str.contains("exact block is zero").all()
    assert (dead.set_index("approximation")["relative_error"].drop("sngd") == 0).all()


def test_pictures_and_folders_of_a_table_are_refused_by_name(tmp_path):
    table = compared(approximations=["kfac"])
    with pytest.raises(ValueError, match="nearest: error") as refused:
        table.plot("eror")
    assert "theme" not in str(refused.value)
    with pytest.raises(ValueError, match="fl.plots.pareto draws other data"):
        table.plot("pareto")
    with pytest.raises(FileNotFoundError, match="holds no comparison.parquet"):
        fl.Comparison.load(tmp_path)


# --- what a new user tried ------------------------------------------------------------------------


def test_a_population_error_below_its_noise_is_not_zero():
    model, (x, y) = net(), batch()
    few = fl.compare(model, CE, x, y, reference=(x[:3] + 1e-9, y[:3]), approximations=["kfac"])
    known = few.frame["population_error"].dropna()
    assert (known > 0).all()
    missing = few.frame[few.frame["population_error"].isna()]
    assert len(missing) and missing["note"].str.contains("too few").all()
    assert missing["population_error_se"].isna().all()
    assert missing["note"].str.contains("needs 10").all()
    assert "have too few unseen examples" in few.note
    with pytest.raises(ValueError, match="the very batch"):
        fl.compare(model, CE, x, y, reference=(x.clone(), y), approximations=["kfac"])


def test_rows_of_a_grouped_convolution_say_what_its_exact_block_is():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    ).double()
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    model(x)
    notes = fl.compare(model, CE, x, torch.arange(6) % 3, approximations=["kfac"]).frame
    notes = notes.groupby("layer")["note"].first()
    assert "2 groups" in notes["0"] and "direct sum" in notes["0"] and notes["3"] == ""


def test_a_run_of_a_command_is_not_overwritten_by_a_table(tmp_path):
    table = compared(approximations=["kfac"])
    table.save(table.save(tmp_path / "own"))  # its own folder, again
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"command": "compare"}')
    with pytest.raises(FileExistsError, match="another folder"):
        table.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json"]


def test_one_damping_and_a_name_given_twice():
    table = compared(approximations=["kfac", "kfac", fl.KFAC()], dampings=0.1)
    assert set(table.frame["approximation"]) == {"kfac"}
    assert list(table.frame["damping_relative"].unique()) == [0.1]
    assert len(table.frame) == table.frame["layer"].nunique()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approximations": []}, "no approximation to compare"),
        ({"dampings": "1e-3"}, "dampings are relative"),
        ({"memory": "800M"}, "memory is a number of bytes"),
        ({"generator": 0}, "generator is 0"),
        ({"mc_samples": 1.5}, "mc_samples must be"),
    ],
)
def test_options_of_the_wrong_kind_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        compared(**{"approximations": ["kfac"]} | options)


def test_labels_of_another_integer_type_are_named():
    x, y = batch()
    for wrong in (y.int(), y.bool()):
        with pytest.raises(fl.CaptureError, match=r"y\.long\(\)"):
            compared(x, wrong, approximations=["kfac"])


def test_a_bar_has_a_step_per_layer_and_method(monkeypatch):
    shown = []
    monkeypatch.setattr("fisherlab.comparison.run.notebook_bar", lambda s: shown.extend(s) or s)
    compared(approximations=["kfac", "diagonal"])
    last = "condition"  # found of all blocks at once
    assert shown == [f"{k}: {m}" for k in "026" for m in ("kfac", "diagonal", last)]


@pytest.mark.parametrize("size", [1, 2, 99])
def test_layers_a_few_at_a_time_are_those_of_all_together(size, monkeypatch):
    model, (x, y) = net(), batch()
    model.append(nn.ReLU()).append(nn.Linear(3, 3).double())
    options = {"fisher_type": "mc", "approximations": ["kfac", "tekfac"], "mc_samples": 2}
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    together = fl.compare(model, CE, x, y, generator=draws[0], **options)
    held, prepare = [], LayerMeasurement._prepare

    def counted(self, samples, memory):
        held.append({name.split(":")[0] for name in samples.captures[0]})
        prepare(self, samples, memory)

    monkeypatch.setattr(LayerMeasurement, "_prepare", counted)
    turns = fl.compare(model, CE, x, y, generator=draws[1], layers_at_once=size, **options)
    same(turns, together)
    assert max(map(len, held)) <= size
    assert torch.equal(draws[0].get_state(), draws[1].get_state())
    for key in ("parameters", "fisher_type", "approximations"):
        assert turns.config[key] == together.config[key]
    # the norm, which is no linear map, has a turn of its own and no block in it
    assert set(turns.config["skipped"]) == set(together.config["skipped"])


def test_turns_keep_what_was_measured_and_refuse_what_has_no_block():
    with pytest.raises(ValueError, match="layers_at_once must be a whole number >= 1, got 0"):
        compared(layers_at_once=0)
    with pytest.raises(fl.CaptureError, match="no layer of this model has a block"):
        fl.compare(nn.Sequential(nn.LayerNorm(3)), CE, randn(4, 3).float(), batch(4)[1],
                   layers_at_once=1)  # fmt: skip

    def stopping(layers):
        if layers == ["6"]:
            raise KeyboardInterrupt
        return layers

    with pytest.raises(Interrupted) as stop:
        compared(layers_at_once=1, progress=stopping, approximations=["kfac"])
    assert set(stop.value.comparison.frame["layer"]) == {"0", "2"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_rounding_says_so(dtype):
    # half of the labels of one input: the mean gradient cancels, and its rounding is all beside it
    x = torch.tensor([[3.0, -1.0, 2.0, 0.5]]).expand(12, 4).to(dtype)
    weight = 1e-4 * torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, -1.0, 1.0, 3.0]])
    model = nn.Linear(4, 2, bias=False).to(dtype)
    model.load_state_dict({"weight": weight.to(dtype)})
    y = torch.arange(12) % 2
    criterion, both = nn.CrossEntropyLoss(), ["eva", "kfac"]
    table = fl.compare(model, criterion, x, y, approximations=both, fisher_type="empirical")
    notes, cosines = table.frame["note"], table.frame["direction_cosine"]
    if dtype == torch.float64:
        assert (notes == "").all()
        assert np.allclose(cosines, 1)
    else:
        doubtful = ~np.isclose(cosines, 1, atol=1e-2)
        assert doubtful.any()
        assert notes[doubtful].str.contains("of the exact step may be the rounding").all()
    ordinary = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = fl.compare(model, criterion, ordinary, y, approximations=both)
    assert not table.frame["note"].str.contains("rounding").any()


def in_two_dtypes(model, criterion, x, y, method):
    """The rows of a method in float32 and in float64."""
    for dtype in (torch.float32, torch.float64):
        batch = x.to(dtype), y.to(dtype) if y.is_floating_point() else y
        model = model.to(dtype)
        yield fl.compare(
            model, criterion, *batch, approximations=[method], fisher_type="empirical"
        ).frame


def test_a_gradient_in_raw_units_keeps_its_small_part_in_float32():
    model, x = nn.Linear(4, 2), 1000 * torch.randn(12, 4)
    nn.init.ones_(model.weight)
    for method in ("ekfac", "kfac"):
        single, double = in_two_dtypes(model, nn.MSELoss(), x, torch.zeros(12, 2), method)
        assert (single.direction_cosine - double.direction_cosine).abs().max() < 1e-3


UNITS = torch.tensor([1e-6, 1.0, 1e-4, 1e-2, 1.0])


@pytest.mark.parametrize("method", ["eva", "ifang", "kfac", "diagonal", "mini_block", "exact"])
@pytest.mark.parametrize("rows", [4, 40])
def test_inputs_in_different_units_have_the_directions_of_float64(method, rows):
    """Entries of their gradients have different roundings: 1e-6 of its length may be real."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(rows, 5) * UNITS
    single, double = in_two_dtypes(model, CE, x, torch.arange(rows) % 2, method)
    measured = single.note == ""
    assert measured.any()
    for column in ("direction_cosine", "direction_error", "quadratic_decrease_scaled"):
        off = (single[column] - double[column]).abs() / (1 + double[column].abs())
        assert off[measured].max() < 1e-2, column


def test_small_inputs_beside_a_bias_have_the_cosine_of_float64():
    torch.manual_seed(1641078069)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = 1e-6 * torch.randn(12, 4), torch.arange(12) % 2
    single, double = in_two_dtypes(model, CE, x, y, "eva")
    assert 0.93 < double.direction_cosine.iloc[0] < 0.94
    assert np.allclose(single.direction_cosine, double.direction_cosine, atol=1e-3)


def test_what_an_eigensolver_may_have_lost_of_a_gradient_says_so():
    """Inputs of 1e-7 in a moment in float32: their eigenvalues are rounding of the others."""
    torch.manual_seed(4)
    x, y = torch.randn(12, 5) * torch.tensor([1.0, 1.0, 1e-7, 1e-7, 1.0]), torch.arange(12) % 2
    model, frames = nn.Linear(5, 10), []
    for dtype in (torch.float32, torch.float64):
        asked = {"approximations": ["sngd"], "fisher_type": "empirical", "dampings": (1e-6,)}
        frames.append(fl.compare(model.to(dtype), CE, x.to(dtype), y, **asked).frame)
    assert (frames[0].direction_cosine - frames[1].direction_cosine).abs()[0] > 0.1
    assert "of its step may be the rounding" in frames[0].note[0]
    assert not frames[1].note[0]


def test_all_methods_measure_a_convnet_in_float32():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 4, 4))
    frame = fl.compare(model, CE, torch.randn(16, 1, 8, 8), torch.arange(16) % 4).frame
    assert set(frame.approximation) >= {"mini_block", "kfac", "shampoo"}
    assert frame[frame.approximation == "mini_block"].condition.notna().all()


def test_a_stein_loss_below_the_rounding_of_its_eigenvalues_says_so():
    torch.manual_seed(67)
    model, x = nn.Linear(4, 3), torch.randn(200, 4) * UNITS[:4]
    y, asked = torch.arange(200) % 3, {"approximations": ["kfac", "tkfac"], "dampings": (1e-6,)}
    frame = fl.compare(model, CE, x, y, **asked).frame
    assert frame.note.str.contains("of its Stein loss lies in eigenvalues below").all()
    assert (fl.compare(model.double(), CE, x.double(), y, **asked).frame.note == "").all()


@pytest.mark.parametrize("seed", [1750742955, 448011273])
def test_equal_inputs_in_float32_have_the_directions_of_float64(seed):
    """Mean gradients that cancel: their rounding beside the block, divided by the damping."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(12, 4)[:1].expand(12, 4), torch.arange(12) % 2
    for method in ("ekfac", "kronecker_optimal", "kfac"):
        single, double = in_two_dtypes(copy.deepcopy(model), CE, x, y, method)
        off = (single.direction_cosine - double.direction_cosine).abs() > 1e-2
        assert single.note[off].str.contains("rounding").all(), (method, single.note.tolist())


def test_numbers_beyond_the_range_of_float32_are_left_out_with_the_reason():
    model, x = nn.Linear(4, 2), 10 * torch.randn(12, 4)
    y = 1e18 * torch.stack([x[:, 0], x[:, 1]], 1) / 10
    single, double = in_two_dtypes(model, nn.MSELoss(), x, y, "kfac")
    assert single.relative_error.isna().all() and single.note.str.contains("pass the range").all()
    assert double.relative_error.notna().all() and (double.note == "").all()


def test_a_step_below_the_range_of_float32_has_no_direction():
    """IFANG divides by `1 / damping^2`, here 1e-68: its step was 0, and its cosine 1."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), 1e-9 * torch.randn(12, 4)
    y = 1e18 * torch.randn(12, 2)
    single, double = in_two_dtypes(model, nn.MSELoss(), x, y, "ifang")
    assert single.direction_cosine.isna().all() and single.note.str.contains("pass the range").all()
    assert double.direction_cosine.notna().all()


def test_a_step_in_eigenvalues_that_a_root_cut_says_so(monkeypatch):
    model, x = nn.Linear(12, 12).double(), torch.randn(40, 12).double()
    x, y = x * torch.logspace(0, -4, 12), torch.zeros(40, 12).double()
    asked = {"approximations": ["shampoo"], "fisher_type": "empirical"}
    whole = fl.compare(model, nn.MSELoss(), x, y, **asked).frame
    monkeypatch.setattr(roots, "_noise", lambda values: 1e-4 * values.max())
    cut = fl.compare(model, nn.MSELoss(), x, y, **asked).frame
    off = (cut.direction_cosine - whole.direction_cosine).abs() > 0.02
    assert off.any() and cut.note[off].str.contains("of its step lies in eigenvalues").all()
    assert not whole.note.str.contains("of its step").any()


def test_a_step_that_its_inverse_makes_of_rounding_says_so():
    """IFANG's inverse takes what is beside its rows by `1 / damping^2`."""
    torch.manual_seed(0)
    x = torch.randn(12, 4) / 10
    model = nn.Linear(4, 2)
    model.load_state_dict({"weight": torch.ones(2, 4), "bias": torch.ones(2)})
    frames = [
        fl.compare(
            copy.deepcopy(model).to(dtype),
            nn.MSELoss(),
            x.to(dtype),
            1e-10 * x[:, :2].to(dtype),
            approximations=["ifang", "kfac"],
            fisher_type="empirical",
        ).frame.set_index(["approximation", "damping_relative"])
        for dtype in (torch.float32, torch.float64)
    ]
    one, two = (frame["direction_cosine"] for frame in frames)
    noted = frames[0]["note"].str.contains("rounding of a float32 gradient")
    assert noted["ifang", 1e-3] and not noted.drop(("ifang", 1e-3)).any()
    assert (one - two).abs()[~noted].max() < 1e-3
    assert not frames[1]["note"].any()


def test_a_cache_in_the_place_of_another_has_none_of_its_seconds():
    with work.Ledger() as ledger:
        with ledger.piece():
            gone = {}
            work.once(gone, "gram", lambda: torch.ones(3))
        # as where Python gives a cache that was filled elsewhere the address of one that is gone
        new = {"gram": torch.ones(3)}
        ledger.pieces[id(new), "gram"] = ledger.pieces[id(gone), "gram"]
        with ledger.piece() as taken:
            work.once(new, "gram", lambda: torch.zeros(3))
        assert not taken.parts
        with ledger.piece() as taken:
            work.once(gone, "gram", lambda: torch.zeros(3))
        assert len(taken.parts) == 1


def test_no_batch_repeats_the_draws_of_another():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1).double(), randn(8, 3), randn(8, 1)
    options = {"fisher_type": "mc", "approximations": ["diagonal"], "dampings": 1.0}
    # noise is drawn example by example
    singles = [(x[k:][:1], y[k:][:1]) for k in range(8)]
    same(fl.compare(model, MSE, x, y, **options), fl.compare(model, MSE, singles, **options))
    # and a reference goes on where the batch ends
    draws = torch.Generator().manual_seed(0)
    _, rest = (
        fl.capture(model, MSE, x[s], y[s], fisher_type="mc", generator=draws)
        for s in (slice(0, 4), slice(4, 8))
    )
    tables = [
        fl.compare(model, MSE, x[:4], y[:4], reference=reference, **options)
        for reference in ((x[4:], y[4:]), rest)
    ]
    same(*tables)
    assert tables[0].frame.diagonal_share.notna().all()  # that of the reference


class Centred(nn.Module):
    """The first layer's examples interact, unless there is one alone."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        a = self.a(x)
        return self.o(torch.tanh(a - a.mean(0) if len(x) > 1 else a))


@pytest.mark.parametrize("where", ["a batch", "the reference"])
def test_a_layer_that_some_batch_has_no_block_of_is_left_out_by_name(where):
    model, x, y = Centred(), randn(5, 3), torch.arange(5) % 2
    one, rest = (x[:1], y[:1]), (x[1:], y[1:])
    if where == "a batch":
        table = fl.compare(model, CE, [one, rest], approximations=["kfac"])
    else:
        table = fl.compare(model, CE, *one, reference=rest, approximations=["kfac"])
    assert set(table.frame.layer) == {"o"}
    assert "in another batch, its rows are not one example each" in table.config["skipped"]["a"]
    assert table.config["parameters"]["covered"] == 10
    with pytest.raises(fl.CaptureError, match="layer 'a'.*one example each"):
        fl.compare(model, CE, [one, rest], layers="a")


def test_a_reference_of_the_tables_own_fisher_type_is_its_own_block():
    options = {"fisher_type": "mc", "approximations": ["kfac"]}
    table = fl.compare(net(), CE, *batch(), reference="mc", **options)
    same(fl.compare(net(), CE, *batch(), **options), table)
