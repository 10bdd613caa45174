"""Pictures of curvature: they show the numbers they are given, and nothing touches anything."""

import pandas as pd
import pytest
import torch
from drawn import complaints
from torch import nn

import fisherlab as fl
from fisherlab import metrics, plots
from fisherlab.metrics import ErrorSplit, GramStudy

METHODS = ["kfac", "ekfac", "tkfac", "tekfac", "diagonal"]


@pytest.fixture(scope="module")
def net():
    data = fl.datasets.load("digits")
    x, y = (tensor[:48] for tensor in data.train.tensors)
    generator = torch.Generator().manual_seed(0)
    model = fl.models.create(
        "mlp", num_classes=10, input_size=data.card.input_shape, generator=generator
    )
    return model.eval(), nn.CrossEntropyLoss(), x, y


@pytest.fixture(scope="module")
def layers(net):
    return fl.capture(*net, fisher_type="empirical")


@pytest.fixture(scope="module")
def study(net, layers):
    return metrics.gram_study(layers, net[3])


@pytest.fixture(scope="module")
def blocks(layers):
    exact = {"exact": fl.Exact()(layers["3"])}
    return exact | {name: fl.approximations.get(name)()(layers["3"]) for name in METHODS}


@pytest.fixture(scope="module")
def table(net):
    model, criterion, x, y = net
    tables = [
        fl.compare(
            model,
            criterion,
            x[:size],
            y[:size],
            approximations=METHODS,
            fisher_type="empirical",
            dampings=(1e-2,),
            reference=(x[32:], y[32:]),
        )
        for size in (8, 16, 32)
    ]
    return fl.Comparison.concat(tables)


@pytest.fixture(scope="module")
def deep():
    """A study as of a network of 22 named layers and 128 examples."""
    generator = torch.Generator().manual_seed(0)
    names = ["stem", *(f"{s}.{b}.conv{c}" for s in range(4) for b in range(3) for c in (1, 2))][:21]
    names.append("classifier")
    U = torch.randn(22, 40, 128, generator=generator, dtype=torch.float64).cumsum(0)
    labels = torch.randint(0, 10, (128,), generator=generator)

    class Layer:
        def __init__(self, u):
            self.u = u

        def gram(self):
            return self.u.mT @ self.u

    return metrics.gram_study({n: Layer(u) for n, u in zip(names, U, strict=True)}, labels)


def images(figure):
    return [image.get_array() for ax in figure.axes for image in ax.get_images()]


def test_gram_matrices_share_one_scale_and_say_the_means(study):
    figure = plots.gram_matrices(study)
    assert not complaints(figure)
    drawn = images(figure)[: len(study.layers)]
    for matrix, correlation in zip(drawn, study.correlations, strict=True):
        torch.testing.assert_close(torch.as_tensor(matrix.data), correlation)
    assert {image.get_clim() for ax in figure.axes[:3] for image in ax.get_images()} == {(-1, 1)}
    assert f"{study.within[0]:.2f} | {study.between[0]:.2f}" in figure.axes[0].get_title()


def test_gram_matrices_can_be_chosen_and_their_classes_named(study):
    figure = plots.gram_matrices(study, layers=["3"], classes=[f"digit {c}" for c in range(10)])
    assert figure.axes[0].get_title().startswith("3\n")
    assert figure.axes[0].get_yticklabels()[0].get_text().startswith("digit")


def test_similarity_says_the_number_in_its_title(study):
    figure = plots.gram_similarity(study)
    assert not complaints(figure)
    assert f"adjacent layers {study.adjacent:.2f}, other pairs {study.apart:.2f}" in figure.title


def test_masses_say_what_is_dropped(study):
    figure = plots.layer_masses(study)
    assert not complaints(figure)
    assert f"{float(study.dropped):.0%}" in figure.title


@pytest.mark.parametrize("draw", [plots.gram_matrices, plots.gram_similarity, plots.layer_masses])
def test_22_layers_of_128_examples_stay_readable(deep, draw):
    figure = draw(deep)
    assert not complaints(figure)
    side = figure.axes[0].get_window_extent().width * 200 / figure.dpi
    assert side >= images(figure)[0].shape[0], "an entry is less than a pixel at print size"


@pytest.mark.parametrize("draw", [plots.gram_over_training, plots.dropped_over_training])
def test_training_pictures_take_studies_by_step(study, deep, draw):
    assert not complaints(draw({0: study, 10: study, 20: study}))
    for ax in plots.gram_over_training({0: study, 1: study, 2: study}).axes[:2]:
        assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_coefficients_mark_the_changed_labels(study, net):
    losses = torch.arange(48.0)
    changed = torch.zeros(48, dtype=torch.bool)
    changed[:3] = True
    figure = plots.coefficients(study, losses, mislabelled=changed)
    assert not complaints(figure)
    kept, marked = figure.axes[0].collections
    assert sorted(marked.get_offsets()[:, 0]) == [0, 1, 2]
    assert len(kept.get_offsets()) == 45
    weight = dict(zip(losses[study.order].tolist(), study.coefficients[0].tolist(), strict=True))
    for loss, drawn in marked.get_offsets():
        assert drawn == pytest.approx(weight[loss])


def test_drift_shows_both_spreads():
    rows = [
        {"epoch": e, "layer": n, "drift": 1.0 + e, "spread": 0.2, "shared_spread": 0.02}
        for e in (1, 2, 3)
        for n in ("0", "3")
    ]
    figure = plots.coefficient_drift(pd.DataFrame(rows))
    assert not complaints(figure)
    assert [t.get_text() for t in figure.axes[1].get_legend().get_texts()] == [
        "of the batch",
        "shared",
    ]


def test_overlaps_angles_and_masses_off_the_diagonal(blocks, table):
    F = blocks["exact"]
    overlaps = {n: metrics.grouped_overlap(blocks[n], F, 8) for n in METHODS}
    figure = plots.eigenbasis_overlap(overlaps, "3")
    assert not complaints(figure)
    torch.testing.assert_close(torch.as_tensor(images(figure)[0].data), overlaps["kfac"].matrix)
    angles = {n: metrics.principal_angles(blocks[n], F, 8) for n in METHODS}
    figure = plots.principal_angles(angles, "3")
    assert not complaints(figure)
    first = figure.axes[0].lines[0].get_ydata()
    torch.testing.assert_close(torch.as_tensor(first), torch.rad2deg(angles["kfac"]))
    assert not complaints(plots.off_diagonal_mass(table))


def test_spectra_draw_the_exact_block_thick_and_leave_out_rounding(blocks):
    spectra = {name: X.eigenvalues() for name, X in blocks.items()}
    figure = plots.eigenvalues(spectra, "3", floor=1e-6)
    assert not complaints(figure)
    lines = figure.axes[0].lines
    assert lines[0].get_linewidth() > lines[1].get_linewidth()
    assert lines[0].get_ydata().min() > 1e-6 * float(spectra["exact"][0])
    shares = {name: metrics.cumulative_trace(X) for name, X in blocks.items()}
    assert not complaints(plots.cumulative_trace(shares, "3"))
    dampings = [1e-3, 1e-1, 1e1]
    curves = {name: metrics.condition_curve(X, dampings) for name, X in blocks.items()}
    assert not complaints(plots.condition_against_damping(dampings, curves, "3"))
    ranks = {"exact": {"0": 3.0, "a.long.name": 5.0}, "kfac": {"0": 9.0, "a.long.name": 8.0}}
    assert not complaints(plots.effective_rank(ranks))


@pytest.mark.parametrize("over", ["layer", "examples", "fisher_type", "n_parameters"])
@pytest.mark.parametrize("facet", [None, "layer"])
def test_errors_over_anything_in_facets(table, over, facet):
    if over == facet:
        facet = "examples"
    figure = plots.error_facets(table, over=over, facet=facet)
    assert not complaints(figure)
    panels = 1 if facet is None else table.frame[facet].nunique()
    assert len(figure.axes) == panels


def test_population_error_is_dashed(table):
    figure = plots.in_sample_against_population(table)
    assert not complaints(figure)
    styles = [line.get_linestyle() for line in figure.axes[0].lines]
    assert styles == ["-", "--"] * len(METHODS)


def test_the_front_is_outlined():
    points = pd.DataFrame(
        {
            "approximation": ["kfac", "ekfac", "diagonal"],
            "build_seconds": [1.0, 2.0, 3.0],
            "relative_error": [0.5, 0.3, 0.9],
        }
    )
    front = metrics.pareto_front(list(points.build_seconds), list(points.relative_error))
    figure = plots.pareto(points, front)
    assert not complaints(figure)
    outlined = [c.get_linewidth()[0] > 0 for c in figure.axes[0].collections]
    assert outlined == [True, True, False]


def test_parts_of_an_error_stack_to_the_total():
    split = ErrorSplit(*(torch.tensor(v) for v in (0.3, -0.1, 0.2)))
    figure = plots.why_bad({"a": split, "b": split})
    assert not complaints(figure)
    heights = sum(bar.get_height() for bar in figure.axes[0].patches)
    assert heights == pytest.approx(2 * float(split.total))


def test_fisher_types_and_draws():
    blocks = {kind: torch.eye(6) * k for k, kind in enumerate(("exact", "mc", "empirical"), 1)}
    distances = {("mc", "exact"): 0.25, ("exact", "mc"): 0.5}
    figure = plots.fisher_types(blocks, distances)
    assert not complaints(figure)
    assert "0.25" in [text.get_text() for ax in figure.axes for text in ax.texts]
    curve = metrics.Convergence(torch.tensor([1.0, 0.7]), torch.tensor([1.0, 0.71]))
    assert not complaints(plots.mc_convergence({"layer 0": curve, "layer 3": curve}))


def test_staleness_and_lines():
    frame = pd.DataFrame(
        {
            "age": [0, 5, 10] * 2,
            "approximation": ["kfac"] * 3 + ["tekfac"] * 3,
            "layer": "0",
            "relative_error": [0.1, 0.2, 0.4, 0.1, 0.3, 0.5],
        }
    )
    assert not complaints(plots.staleness(frame))
    figure = plots.lines(frame, "age", "relative_error", log="y")
    assert not complaints(figure)
    assert figure.axes[0].get_yscale() == "log"


def test_a_figure_shows_itself_as_html_and_in_a_notebook(study, monkeypatch):
    figure = plots.gram_similarity(study)
    page = figure._repr_html_()
    assert page.startswith("<img") and "max-width:100%" in page and "Similarity" in page
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: shown.append((a, k)))
    figure._ipython_display_()
    assert shown[0][0][0]["image/png"] and shown[0][1] == {"raw": True}


def test_a_comparison_shows_itself_as_html(table):
    assert "<table" in table._repr_html_()


def test_explorer_computes_what_the_metrics_do(net):
    explorer = plots.explore(*net, fisher_type="empirical", approximations=METHODS)
    layer = fl.capture(*net, fisher_type="empirical")["3"]
    F, X = fl.Exact()(layer), fl.EKFAC()(layer)
    damping = 0.01 * F.trace().item() / F.size
    numbers = explorer.numbers("3", "ekfac", 0.01)
    assert numbers["relative error"] == pytest.approx(metrics.relative_error(X, F).item())
    expected = metrics.direction_cosine(X, F, layer.gradient, damping).item()
    assert numbers["direction cosine"] == pytest.approx(expected, rel=1e-4)
    figure = explorer.look("3", "ekfac", 0.01)
    assert not complaints(figure)
    assert "Layer 3, ekfac at damping 0.01" in figure.title
    assert "3 layers" in repr(explorer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_explorer_controls_change_the_picture_and_without_a_kernel_it_is_one(net, monkeypatch):
    explorer = plots.explore(*net, fisher_type="empirical", approximations=["kfac", "diagonal"])
    controls, picture = explorer.widgets().children
    layer, method, damping = controls.children
    before = picture.value
    method.value = "diagonal"
    assert "diagonal" in picture.value and picture.value != before
    layer.value = "5"
    assert "Layer 5" in picture.value
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    explorer._ipython_display_()
    assert shown[0].title.startswith("Layer 1, kfac")  # no kernel answers a test
    assert explorer._repr_html_().startswith("<img")


def test_explorer_refuses_an_unknown_approximation(net):
    with pytest.raises(ValueError, match="unknown approximation 'kfca'; did you mean 'kfac'"):
        plots.explore(*net, approximations=["kfca"])


def test_pictures_leave_pyplot_and_the_users_settings_alone(study):
    import matplotlib as mpl
    from matplotlib import pyplot

    before = dict(mpl.rcParams)
    plots.gram_similarity(study)
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []


def test_study_is_a_value(study):
    assert isinstance(study, GramStudy)
    assert study.correlations.shape == (3, 48, 48)


def test_a_comparison_shows_a_bar_per_layer_and_method_where_somebody_looks(monkeypatch):
    import IPython
    from tqdm.auto import tqdm

    from fisherlab.comparison import notebook_bar

    names = ["0: kfac", "0: diagonal"]
    assert notebook_bar(names) is names
    with monkeypatch.context() as terminal:
        terminal.setattr("sys.stderr.isatty", lambda: True, raising=False)
        shown = notebook_bar(names)
    # from the start
    assert isinstance(shown, tqdm) and shown.total == 2 and shown.delay == 0
    shown.close()
    shell = type("Shell", (), {"kernel": object()})()
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    bar = notebook_bar(names)
    assert isinstance(bar, tqdm) and list(bar) == names


def test_eigenvalues_are_no_shares_of_the_trace():
    falling = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'kfac' fall with k.*metrics\.cumulative_trace"):
        fl.plots.cumulative_trace({"kfac": falling})
    fl.plots.cumulative_trace({"kfac": falling.cumsum(0)})


def test_gram_matrices_of_several_epochs_stand_in_one_figure(study):
    figure = plots.gram_matrices({"epoch 0": study, "epoch 1": study})
    assert len(images(figure)) == 2 * len(study.layers)
    assert len(figure.axes) == 2 * len(study.layers) + 1  # and the colours' bar
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0].startswith(f"epoch 0, layer {study.layers[0]}\n")
    assert titles[len(study.layers)].startswith(f"epoch 1, layer {study.layers[0]}\n")
    assert not complaints(figure) and len(repr(study)) < 200
