"""Claims: their two sides, their verdicts, what is searched, saved and shown."""

import ast
import inspect
import json
import math
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser
from typer.testing import CliRunner

import fisherlab as fl
from fisherlab import claims, cli, models
from fisherlab.claims import base, dense, instances, search
from fisherlab.claims.base import AtMost, Claim, ClaimError, Identity, Order, Usually
from fisherlab.claims.real import real_cases
from fisherlab.claims.table import Trials, summary
from fisherlab.plots import claims as pictures

run = CliRunner().invoke
LEFT_ALONE = ("__del__", "remove", "__repr__")  # what takes an object down
THEIRS = re.compile(r"fisherlab\.(approximations|blocks|extract|metrics|network|optim)")


@pytest.fixture(scope="module")
def table():
    return fl.claims.verify()


def a_case(name, seed=0):
    claim, generator = claims.get(name), torch.Generator().manual_seed(seed)
    for _ in range(400):
        case = claim.draw(generator, 0.7)
        if claim.assume(case):
            return claim, case
    raise AssertionError(f"no case of {name} meets its assumption")


# Verdicts -----------------------------------------------------------------------------------------


def test_every_verdict_is_the_one_on_record(table):
    assert not table.unexpected, table.frame.set_index("claim").loc[table.unexpected].to_string()
    assert list(table.frame.claim) == claims.names()
    assert (table.frame.holds == (table.frame.verdict == "holds")).all()


def test_the_table_has_the_columns_that_are_promised(table):
    promised = ["claim", "kind", "source", "holds", "expected", "verdict", "margin", "trials"]
    assert set([*promised, "counterexample", "seconds", "note"]) <= set(table.frame)
    assert table.frame.holds.dtype == bool
    assert (table.frame.trials >= 1).all()
    html = table._repr_html_()
    assert "fngd_theorem_as_printed" in html and "<table" in html
    assert "all as on record" in repr(table)
    sizes = table.margins.groupby("claim").size()
    assert (sizes[table.frame.claim].to_numpy() == table.frame.trials).all()
    name = "tekfac_error_at_most_tkfac"
    one = table.margins.set_index("claim").loc[name]
    assert one.margin.min() == table.frame.set_index("claim").margin[name]
    assert (one.left <= one.right + 1e-12).all()  # rounding, where both are 0


def test_every_claim_says_what_and_where():
    parser = MathTextParser("agg")
    for name in claims.names():
        claim = claims.get(name)
        assert claim.paper in claims.PAPERS, name
        assert len(claim.statement) > 30 and claim.statement.endswith("."), name
        assert claim.latex, name
        assert claim.kind in claims.KINDS, name
        # what a reader of the papers can look up
        assert not re.search("details|methods|trap|errat", claim.source), name
        parser.parse(pictures.formula(claim.latex))
        assert claim.expected in ("holds", "refuted"), name
        if claim.outside:
            assert claim.assumption, name
            assert claims.get(claim.outside).expected == "refuted", name


# Each was held against the text of its paper: the refuted sentences that the papers print or imply.
REFUTED_OF_THE_PAPERS = {
    "ang_blend_has_unit_length_in_the_g_norm",
    "ang_factors_as_printed",
    "ang_point_is_the_minimiser_for_any_weights",
    "fngd_lemma_3_as_printed",
    "fngd_norm_bound_as_printed",
    "fngd_shared_coefficients_keep_information",
    "fngd_sharing_predicts_the_next_epoch",
    "fngd_theorem_as_printed",
    "newton_schulz_without_scaling",
    "sngd_refresh_as_printed",
}
DENIED_BY_THE_PAPERS = {
    "ang_ends_as_sgd",
    "empirical_fisher_is_fisher",
    "kfac_is_exact_for_networks",
    "kfac_keeps_the_trace",
    "shampoo_is_kl_optimal_for_two_factors",
}


def test_only_what_a_paper_says_counts_as_its_error(table):
    frame = table.frame
    found = {
        kind: set(frame.claim[(frame.kind == kind) & (frame.verdict == "refuted")])
        for kind in claims.KINDS
    }
    assert found["claim"] == REFUTED_OF_THE_PAPERS
    assert found["contrast"] == DENIED_BY_THE_PAPERS
    errors = f"({len(REFUTED_OF_THE_PAPERS)} claims of the papers refuted, "
    assert errors in repr(table)
    assert f"{len(found['extension'])} extensions refuted" in repr(table)
    # a contrast that held would be an error of the paper
    assert (frame.verdict[frame.kind == "contrast"] == "refuted").all()


def test_a_summary_counts_by_kind_and_knows_one_from_many():
    rows = [
        ("claim", "holds"),
        ("claim", "refuted"),
        ("extension", "holds"),
        ("extension", "holds"),
    ]
    frame = pd.DataFrame([*rows, ("contrast", "undecided")], columns=["kind", "verdict"])
    assert summary(frame) == (
        "1 claim of the papers refuted, 1 holds; 2 extensions hold; 1 contrast undecided"
    )
    assert summary(frame[:1]) == "1 claim of the papers holds"
    assert summary(frame[:0]) == "none tried"


def test_a_kind_of_no_meaning_is_refused():
    with pytest.raises(ClaimError, match="kind 'theorem'; kinds: claim, extension, contrast"):

        class Odd(Toy, name="odd"):
            """Has a kind of its own."""

            kind = "theorem"

    assert "odd" not in claims.names()


def test_the_notebook_counts_the_claims_there_are():
    path = Path(__file__).parents[2] / "notebooks" / "11_three_claims.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    (stored,) = next(cell for cell in notebook["cells"] if cell.get("execution_count") == 1)[
        "outputs"
    ]
    kinds = Counter(claims.get(name).kind for name in claims.names())
    assert ast.literal_eval("".join(stored["data"]["text/plain"])) == kinds


def test_a_counterexample_violates_its_claim(table):
    refuted = table.frame[table.frame.verdict == "refuted"]
    for row in refuted.itertuples():
        claim, case = claims.get(row.claim), table.counterexample(row.claim)
        assert claim.assume(case), row.claim
        assert claim.margin(case) < -claim.noise, row.claim
        assert row.numbers == search.numbers_in(case)
    assert (table.frame.counterexample[table.frame.verdict == "holds"] == "").all()
    assert table.counterexample("ekfac_keeps_the_trace") is None
    with pytest.raises(ClaimError, match="was not tried"):
        table.counterexample("kfac")


def test_counterexamples_are_small(table):
    numbers = table.frame.set_index("claim").numbers
    # M = T = 1 and scalars are exact, so these are near the least that there can be
    assert numbers["kfac_keeps_the_trace"] <= 8
    assert numbers["kfac_is_exact_for_networks"] <= 12
    assert numbers["newton_schulz_without_scaling"] == 1
    assert numbers["fngd_theorem_for_one_layer"] <= 6
    assert numbers["tkfac_error_at_most_kfac"] <= 60


def test_verdicts_depend_on_the_seed_and_name_alone():
    together = claims.verify(["ekfac_keeps_the_trace", "kfac_keeps_the_trace"], seed=3).frame
    alone = claims.verify("kfac_keeps_the_trace", seed=3).frame
    assert together.margin[1] == alone.margin[0]
    assert claims.verify("kfac_keeps_the_trace", seed=4).frame.margin[0] != alone.margin[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 20))
def test_verdicts_are_the_same_over_twenty_seeds(seed):
    table = claims.verify(seed=seed)
    assert not table.unexpected, table.frame.set_index("claim").loc[table.unexpected].to_string()


# Independence -------------------------------------------------------------------------------------


def refuse(*args, **options):
    raise AssertionError("one side calls the other's code")


def sabotage_fisherlab(patch):
    """Every function and method of the packages that the FisherLab sides are made of raises."""
    loaded = {name: m for name, m in sys.modules.items() if name.startswith("fisherlab.")}
    for module in loaded.values():
        theirs = THEIRS.match(module.__name__)
        if not theirs and not module.__name__.startswith("fisherlab.claims."):
            continue
        for name, value in list(vars(module).items()):
            home = getattr(value, "__module__", None) or ""
            if isinstance(value, types.FunctionType) and THEIRS.match(home):
                patch.setattr(module, name, refuse)
            elif inspect.isclass(value) and theirs and home == module.__name__:
                for attribute, method in list(vars(value).items()):
                    if isinstance(method, types.FunctionType) and attribute not in LEFT_ALONE:
                        patch.setattr(value, attribute, refuse)


def sabotage_dense(patch):
    for name, value in list(vars(dense).items()):
        if isinstance(value, types.FunctionType) and value.__module__ == dense.__name__:
            patch.setattr(dense, name, refuse)
    patch.setattr(dense.Layered, "__init__", refuse)


def works(side, case):
    try:
        side(case)
    except AssertionError as error:
        assert "the other's code" in str(error)
        return False
    return True


@pytest.mark.parametrize("name", claims.names())
def test_no_side_calls_the_code_of_the_other(name, monkeypatch):
    claim, case = a_case(name)
    with monkeypatch.context() as patch:
        sabotage_fisherlab(patch)
        by_itself = [works(side, case) for side in (claim.left, claim.right)]
    with monkeypatch.context() as patch:
        sabotage_dense(patch)
        without_dense = [works(side, case) for side in (claim.left, claim.right)]
    assert any(by_itself), "neither side is computed without FisherLab"
    for alone, free in zip(by_itself, without_dense, strict=True):
        assert alone or free, "one side is made of both"


def test_sabotage_would_be_noticed(monkeypatch):
    claim, case = a_case("tekfac_error_at_most_tkfac")
    sabotage_fisherlab(monkeypatch)
    assert not works(claim.left, case)
    sabotage_dense(monkeypatch)
    assert not works(claim.right, case)


# The orderings over the whole input space ---------------------------------------------------------

sizes = st.integers(1, 3)
# zeros, ties and cancellation as well as generic numbers
numbers = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-8, 8, allow_nan=False, width=32)
)


@st.composite
def layer_cases(draw):
    m, n, t, o, i = (draw(sizes) for _ in range(5))
    a = draw(st.lists(numbers, min_size=n * t * i, max_size=n * t * i))
    g = draw(st.lists(numbers, min_size=m * n * t * o, max_size=m * n * t * o))
    units = 10.0 ** draw(st.integers(-3, 3))
    return {
        "a": torch.tensor(a, dtype=torch.float64).view(n, t, i),
        "g": units * torch.tensor(g, dtype=torch.float64).view(m, n, t, o),
        "V": torch.ones(1, o, i, dtype=torch.float64),
    }


ORDERINGS = (
    "tekfac_error_at_most_tkfac",
    "ekfac_error_at_most_kfac",
    "optimal_kronecker_product_is_a_lower_bound",
)


@pytest.mark.parametrize("name", ORDERINGS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=layer_cases())
def test_orderings_hold_for_every_capture(name, case):
    # a block of noughts, or one whose entries vanish beside rounding, has no relative error
    assume(dense.gradients(case).norm() > 1e-6)
    claim = claims.get(name)
    assert claim.margin(case) >= -max(claim.noise, 1e-6)


@pytest.mark.parametrize("name", [f"{x}_keeps_the_trace" for x in ("tkfac", "ekfac", "tekfac")])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=layer_cases())
def test_traces_are_kept_for_every_capture(name, case):
    assume(dense.gradients(case).norm() > 1e-6)
    assert claims.get(name).margin(case) > 0


# The machinery ------------------------------------------------------------------------------------


class Toy(AtMost):
    """x is at most y."""

    source = "TOY (1)"
    free = ("x",)
    trials = 4

    def draw(self, generator, size):
        return {"x": torch.rand(3, generator=generator).double(), "y": 10.0}

    def left(self, case):
        return case["x"].sum()

    def right(self, case):
        return case["y"]

    def smaller(self, case):
        for k in range(len(case["x"]) if len(case["x"]) > 1 else 0):
            yield {**case, "x": torch.cat([case["x"][:k], case["x"][k + 1 :]])}


def test_a_hunt_finds_what_no_draw_shows():
    toy, generator = Toy(), torch.Generator().manual_seed(0)
    case = toy.draw(generator, 0.0)
    assert toy.margin(case) > 0
    moved, margin = search.hunt(toy, case, generator, 400)
    assert margin < 0
    assert toy.margin(moved) == margin
    least, found = search.smallest(toy, moved)
    assert len(least["x"]) == 1 and found < 0
    # numbers that a reader can copy
    assert torch.equal(least["x"], least["x"].round(decimals=1))


@pytest.mark.parametrize(
    ("margins", "verdict"),
    [
        ([0.5, 0.2], "holds"),
        ([0.5, -0.2], "refuted"),
        ([1e-12, -1e-12, 1e-13], "undecided"),
        ([0.5, math.nan], "undecided"),
        ([0.0, 0.5, 0.5], "holds"),
    ],
)
def test_three_verdicts(margins, verdict):
    found, _, note = Toy().verdict(margins)
    assert found == verdict
    assert note or verdict == "holds"


def test_frequencies_have_intervals():
    class Often(Usually, Toy):
        """x is mostly at most y."""

    assert Often().verdict([0.1] * 30)[0] == "holds"
    assert Often().verdict([0.1] * 15 + [-0.1] * 15)[0] == "undecided"
    verdict, margin, note = Often().verdict([0.1] * 2 + [-0.1] * 28)
    assert verdict == "refuted" and margin < 0 and "2 of 30" in note
    # Wilson's interval of 8 of 10 is 0.4902 to 0.9433
    assert "interval 0.49 to 0.94" in Often().verdict([0.1] * 8 + [-0.1] * 2)[2]


def test_orders_are_fitted():
    class Grows(Order, Toy):
        """The error falls with the power 2.5."""

    x = 0.5 ** torch.arange(6, dtype=torch.float64)
    assert Grows().power(3 * x**2.5, 0 * x) == pytest.approx(2.5)
    assert math.isnan(Grows().power(0 * x, 0 * x))


def test_identities_are_measured_in_decades():
    class Same(Identity, Toy):
        """Both sides are one."""

    same, one = Same(), torch.ones(3, dtype=torch.float64)
    assert same.compare(one, one) == pytest.approx(9)
    assert same.compare(one, 1.1 * one) < -6
    assert same.compare(one * math.nan, one) == -math.inf
    assert math.isnan(same.compare(one, one * math.nan))


def test_an_undecided_claim_is_no_contradiction_and_exits_0():
    usual = ["tkfac_beats_kfac_usually", "tekfac_beats_ekfac_usually"]
    result = CliRunner().invoke(cli.app, ["verify", *usual, "--trials", "3"])
    assert result.exit_code == 0, result.output[-500:]
    assert "1 claim of the papers undecided; 1 extension undecided" in result.output


def test_a_matrix_that_cannot_be_factored_leaves_a_trial_undecided():
    class Singular(Toy):
        """Never comes to an end."""

        def left(self, case):
            return torch.linalg.inv(torch.zeros(2, 2)).sum()

    trials = Trials(Singular())
    trials.add({"x": torch.zeros(1), "y": 1.0})
    assert math.isnan(trials.margins[0])
    assert Singular().verdict(trials.margins)[0] == "undecided"


def test_unknown_claims_are_refused_with_the_nearest():
    with pytest.raises(ClaimError, match="tekfac_keeps_the_trace"):
        claims.verify("tekfac_keeps_trace")
    with pytest.raises(ClaimError, match="nearest: tekfac, kfac; .*--list"):
        claims.verify("tekfack")
    with pytest.raises(ClaimError, match="no claim or paper named 'zzz'; papers: .*fngd.*tekfac"):
        claims.verify("zzz")
    with pytest.raises(ClaimError, match="trials must be a whole number >= 1, got 0"):
        claims.verify(trials=0)
    with pytest.raises(ClaimError, match="exists already"):

        class Other(Toy, name="kfac_keeps_the_trace"):
            """Another of that name."""

    assert claims.get("kfac_keeps_the_trace").paper == "TEKFAC"


def test_papers_name_their_claims():
    frame = claims.verify("sngd", trials=2).frame
    assert set(frame.paper) == {"SNGD"}
    assert list(frame.claim) == claims.names("sngd") == claims.names("SNGD")
    with pytest.raises(claims.ClaimError, match="unknown paper 'sgd'; one of ang"):
        claims.names("sgd")


def test_an_assumption_that_nothing_meets_is_said():
    class Never(Toy):
        """Has an assumption that cannot be met."""

        name = "never"
        assumption = "one is two"

        def assume(self, case):
            return False

    with pytest.raises(ClaimError, match="one is two"):
        from fisherlab.claims.table import _try

        _try(Never(), None, 2, torch.Generator())


def test_labels_are_a_distribution():
    f = torch.randn(4, 3, dtype=torch.float64)
    for criterion in instances.CRITERIA:
        pairs = list(instances.labels(criterion, f))
        torch.testing.assert_close(sum(w for _, w in pairs), torch.ones(4).double())
        if criterion == "squared_error":
            second = sum(w[:, None] * (y - f).square() for y, w in pairs)
            torch.testing.assert_close(second, torch.full_like(f, 0.5))


# Real networks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    names = ["tekfac_error_at_most_tkfac", "ekfac_keeps_the_trace", "fisher_is_gauss_newton"]
    names += ["sngd_refresh_keeps_the_function", "tkfac_error_at_most_kfac", "gram_matrix_costs_m2"]
    return claims.verify(names, on="digits:mlp")


def test_claims_are_asked_of_a_real_network(digits):
    frame = digits.frame.set_index("claim")
    # costs are nothing that a trained network could say
    assert "gram_matrix_costs_m2" not in frame.index
    assert frame.trials["ekfac_keeps_the_trace"] == 3 * 3 * 2  # steps, layers, Fisher types
    assert (frame.verdict.drop("tkfac_error_at_most_kfac") == "holds").all()
    assert not digits.unexpected


def test_real_cases_are_of_a_network_that_learns():
    cases = list(real_cases("digits:mlp", steps=(0, 100)))
    assert {case["step"] for case in cases} == {0, 100}
    losses = {}
    for case in cases:
        f = instances.model_of(case)(case["x"])
        losses[case["step"]] = instances.criterion_of(case, "mean")(f, case["y"]).item()
    assert losses[100] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("on", "message"), [("digits", "DATASET:MODEL"), ("digit:mlp", "digits"), ("digits:mpl", "mlp")]
)
def test_what_no_network_is_made_of_is_refused(on, message):
    with pytest.raises(ValueError, match=message):
        claims.verify("kfac_keeps_the_trace", on=on)
    assert "mlp" in models.names()


# Files, pictures, command -------------------------------------------------------------------------


def test_a_table_is_saved_and_read_again(table, tmp_path):
    folder = table.save(tmp_path / "verify")
    frame = pd.read_parquet(folder / "claims.parquet")
    assert len(frame) == len(table.frame)
    for row in frame[frame.verdict == "refuted"].itertuples():
        case = claims.load(folder / row.counterexample)
        assert claims.get(row.claim).margin(case) < 0
    rows = json.loads((folder / "claims.json").read_text())["claims"]
    assert rows[0]["latex"] and rows[0]["statement"]
    table.save(folder)  # over itself


def test_pictures_show_both_sides(table):
    drawn = pictures.worth_drawing(table)
    assert "fngd_theorem_as_printed" in drawn and "woodbury_step_is_dense_step" not in drawn
    for name in ("ekfac_error_at_most_kfac_out_of_sample", "kl_is_quadratic_to_second_order"):
        figure = pictures.claim(table, name)
        assert name.replace("_", " ") in figure.title
    ax = pictures.claim(table, "ekfac_error_at_most_kfac_out_of_sample").axes[0]
    shown = sum(len(points.get_offsets()) for points in ax.collections)
    assert shown == len(table.trials["ekfac_error_at_most_kfac_out_of_sample"].pairs)
    ax = pictures.claim(table, "fngd_theorem_as_printed").axes[0]
    worst, bound = (line.get_ydata() for line in ax.lines)
    assert worst[-1] > bound[-1]
    ax = pictures.claim(table, "kfac_is_exact_for_networks").axes[0]
    assert len(ax.collections[0].get_offsets()) > 3
    axes = pictures.verdicts(table).axes
    assert len(axes) == len(claims.KINDS)
    # every bar is as long as its number of rows: the panels tell the whole table
    total = sum(bar.get_width() for ax in axes for bar in ax.patches)
    assert total == len(table.frame)


def test_the_command_leaves_a_page(tmp_path):
    out = tmp_path / "run"
    done = run(cli.app, ["verify", "sngd", "--trials", "4", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "newton_schulz_converges" in done.output and "SNGD: Liu et al." in done.output
    page = (out / "report.html").read_text()
    assert "newton schulz without scaling" in page and page.count("data:image/png") >= 3
    assert "2 claims of the papers refuted, " in page and "Extension: ours" in page
    again = run(cli.app, ["verify", "sngd", "--out", str(out)])
    assert again.exit_code == 2 and "--overwrite" in again.output
    path = out / "claims.json"
    path.write_text(path.read_text().replace('"kind"', '"sort"'))
    older = run(cli.app, ["report", str(out)])
    assert older.exit_code == 2 and "without their kinds; run it again" in older.output


def test_the_command_fails_where_a_verdict_is_not_on_record(monkeypatch):
    monkeypatch.setattr(claims.sngd.NewtonSchulz, "expected", "refuted")
    done = run(cli.app, ["verify", "newton_schulz_converges"])
    assert done.exit_code == 1
    assert "newton_schulz_converges" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_claim"], "no claim or paper named 'no_such_claim'"),
        (["--trials", "0"], "at least 1"),
        (["sngd", "--on", "digits"], "DATASET:MODEL"),
    ],
)
def test_mistakes_of_the_user_end_with_code_2_and_make_nothing(arguments, message, tmp_path):
    done = run(cli.app, ["verify", *arguments, "--overwrite", "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and not list(tmp_path.iterdir())
    assert message in done.output
    assert "Traceback" not in done.output


def test_an_interrupted_run_keeps_what_was_tried(monkeypatch, tmp_path):
    def stop(self, case):
        raise KeyboardInterrupt

    monkeypatch.setattr(claims.sngd.DenmanBeavers, "left", stop)
    done = run(cli.app, ["verify", "sngd", "--trials", "2", "--out", str(tmp_path / "run")])
    assert done.exit_code == 130
    frame = pd.read_parquet(tmp_path / "run" / "claims.parquet")
    assert "newton_schulz_converges" in set(frame.claim)
    assert "denman_beavers_converges" not in set(frame.claim)


def test_claims_are_a_lazy_part_of_the_package():
    assert fl.claims is claims
    assert issubclass(Order, Claim) and base.names() == claims.names()


def test_the_command_lists_claims_whole_without_trying_them(monkeypatch):
    monkeypatch.setattr(claims.base.Claim, "margin", None)
    done = run(cli.app, ["verify", "--list"])
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in claims.names())
    for name in claims.names():
        assert re.search(rf"(?m)^{name}  .*  {claims.get(name).kind}  ", done.output), name
    assert "newton_schulz_is_quadratic" not in run(cli.app, ["verify", "--list", "fngd"]).output
