"""Pictures of a comparison: what is in them, in which colours, and that they leave no state."""

import itertools
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from drawn import NAMES, complaints, frame
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb

import fisherlab as fl
from fisherlab import approximations, metrics, plots
from fisherlab.plots import theme

KINDS = ["error", "trace_ratio", "direction", "training", "cost"]


def lines(ax):
    """`{colour: (x, y)}` of the lines with data."""
    return {
        to_hex(line.get_color()): np.asarray(line.get_xydata())
        for line in ax.lines
        if line.get_marker() not in ("", "None")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_draws_a_comparison_and_its_frame_alike(kind):
    table = fl.Comparison(frame())
    one, two = table.plot(kind), getattr(plots, kind)(frame())
    assert [len(ax.lines) for ax in one.axes] == [len(ax.lines) for ax in two.axes]
    assert one.get_suptitle() and all(ax.has_data() for ax in one.axes)


def test_error_has_a_panel_per_step_and_the_values_of_the_frame():
    figure = plots.error(frame())
    assert [ax.get_title() for ax in figure.axes] == ["step 0", "step 5"]
    for ax in figure.axes:
        drawn = lines(ax)
        # the exact block's error of 0 has no place on a log axis
        assert set(drawn) == {to_hex(theme.colour(name)) for name in NAMES[1:]}
        assert np.allclose(drawn[to_hex(theme.colour("tekfac"))], [[0, 0.2], [1, 0.2], [2, 0.2]])
        assert ax.get_yscale() == "log"


def test_direction_is_drawn_over_the_damping_of_the_last_step():
    figure = plots.direction(frame(layers=2))
    assert [ax.get_title() for ax in figure.axes] == ["layer 0", "layer 1"]
    drawn = lines(figure.axes[0])[to_hex(theme.colour("kfac"))]
    assert np.allclose(drawn, [[0.01, 0.998], [0.1, 0.98]])


def test_a_comparison_that_leads_with_the_population_error_is_drawn_with_it():
    noisy = frame().assign(diagonal_share=0.9)
    figure = fl.Comparison(noisy).plot("error")
    drawn = lines(figure.axes[0])
    assert np.allclose(drawn[to_hex(theme.colour("exact"))][:, 1], 0.2)


def test_a_figure_stays_readable_with_twenty_layers():
    figure = plots.error(frame(layers=20))
    FigureCanvasAgg(figure).draw()
    for ax in figure.axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        apart = [b.x0 >= a.x1 - 1 for a, b in itertools.pairwise(boxes)]
        assert all(apart)


def test_the_legend_is_outside_of_every_panel():
    for kind in KINDS:
        figure = getattr(plots, kind)(frame())
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert all(not box.overlaps(ax.get_window_extent()) for ax in figure.axes)
        assert box.x1 <= figure.bbox.x1 + 1


def test_a_long_name_does_not_push_the_legend_into_the_title():
    long = frame().replace({"approximation": {"my_own": "a_very_long_name_of_mine_indeed"}})
    for kind in KINDS:
        found = [said for said in complaints(getattr(plots, kind)(long)) if "title" in said]
        assert not found


def test_every_registered_approximation_has_its_own_look():
    looks = [theme.look(name) for name in approximations.names()]
    assert len(set(looks)) == len(looks)
    colours = [np.array(to_rgb(colour)) for colour, *_ in looks]
    apart = [abs(a - b).max() for k, a in enumerate(colours) for b in colours[:k]]
    assert min(apart) > 0.05


USERS = [f"mine_{k}" for k in range(8)]
MANY = ["exact", "kfac", *USERS]


def drawn_looks(ax):
    """`(colour, marker)` of the curves of a panel."""
    return [(to_hex(line.get_color()), str(line.get_marker())) for line in ax.lines]


@pytest.mark.parametrize("count", [1, 8, 12, 60])
def test_no_two_users_names_of_a_picture_share_a_look(count):
    names = [*theme.LOOKS, *(f"mine_{k}" for k in range(count))]
    found = theme.looks(names)
    assert len(set(found.values())) == len(names)
    assert found == theme.looks(reversed(names))  # whatever the order
    assert all(found[name] == theme.LOOKS[name] for name in theme.LOOKS)
    colours = {found[name].colour for name in names if name not in theme.LOOKS}
    assert len(colours) == min(count, len(theme.SPARE))
    assert not colours & {colour for colour, *_ in theme.LOOKS.values()}


def test_eight_curves_of_the_users_own_are_told_apart_in_every_picture():
    spectrum = {name: torch.linspace(1, 0.1 + 0.01 * k, 9) for k, name in enumerate(MANY)}
    shares = {name: values.cumsum(0) for name, values in spectrum.items()}
    rows = [
        {"approximation": name, "examples": n, "x": n, "relative_error": 0.1 + 0.01 * k,
         "population_error": 0.2 + 0.01 * k, "age": n, "layer": "0", "step": 0, "seed": 0,
         "direction_cosine": 1 - 0.01 * k, "damping_relative": 0.1 * n, "build_seconds": 1.0 + k}
        for k, name in enumerate(MANY) for n in (1, 2, 3)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    run = run_of(4, USERS)
    pictures = [
        plots.direction(frame), plots.error_facets(frame, "examples"), plots.staleness(frame),
        plots.lines(frame, "x", "relative_error"), plots.training_curves(*run, "accuracy"),
        plots.eigenvalues(spectrum), plots.cumulative_trace(shares),
        plots.condition_against_damping(range(1, 10), spectrum), plots.principal_angles(spectrum),
        plots.effective_rank({name: {"0": 1.0, "1": 1 / (k + 1)} for k, name in enumerate(MANY)}),
    ]  # fmt: skip
    for figure in pictures:
        legend = [(to_hex(h.get_color()), h.get_marker()) for h in figure.legends[0].legend_handles]
        assert len(set(legend)) == len(legend) >= 8
        assert len({colour for colour, _ in legend}) == len(legend)
        for ax in figure.axes:
            drawn = {look for look in drawn_looks(ax) if look[1] not in ("", "None")}
            assert drawn == set(legend), figure.get_suptitle()


def test_a_users_approximation_keeps_its_look_whatever_else_is_there():
    assert theme.look("my_own") == theme.look("my_own")
    figures = plots.error(frame()), plots.training(frame()[lambda t: t.approximation == "my_own"])
    for figure in figures:
        assert to_hex(theme.colour("my_own")) in lines(figure.axes[0])


def test_pictures_leave_the_users_settings_alone():
    def settings():  # the backend is found out when it is first needed
        return {name: value for name, value in mpl.rcParams.items() if name != "backend"}

    before = settings()
    plots.error(frame())
    assert settings() == before


def test_save_writes_print_size_and_vector(tmp_path):
    from PIL import Image

    figure = plots.cost(frame())
    png, pdf = plots.save(figure, tmp_path / "deep" / "cost.v1")
    assert png.name == "cost.v1.png" and pdf.read_bytes().startswith(b"%PDF")
    with Image.open(png) as image:
        assert image.width == round(theme.FULL * theme.DPI)


@pytest.mark.parametrize(("low", "decimal"), [(0.4, True), (1e-6, False)])
def test_a_logarithmic_axis_of_few_powers_of_ten_reads_as_decimals(
    low: float, decimal: bool
) -> None:
    @theme.themed
    def draw() -> theme.Picture:
        figure, (ax,) = theme.panels(1)
        ax.semilogy([0, 1], [low, 1.0])
        return figure

    figure = draw()
    figure.draw_without_rendering()
    both = figure.axes[0].yaxis.get_ticklabels(minor=True)
    texts = {t.get_text() for t in [*both, *figure.axes[0].yaxis.get_ticklabels()]} - {""}
    assert ("0.6" in texts) is decimal
    assert any("10^" in text for text in texts) is not decimal


def run_of(steps, names=("sgd", "kfac")):
    """The rows and the loss curve of a run of so many steps in one epoch."""
    found = [
        {"optimizer": name, "seed": 0, "step": step, "train_seconds": (k + 1) * step * 0.01,
         "train_loss": 2.0 / (step + 1), "accuracy": 0.1 * step}
        for k, name in enumerate(names) for step in range(steps + 1)
    ]  # fmt: skip
    curve = pd.DataFrame([row for row in found if row["step"]])
    return pd.DataFrame([row for row in found if row["step"] in (0, steps)]), curve


def test_one_step_has_no_panels_of_a_loss_that_is_one_for_all():
    many = plots.training_curves(*run_of(4), "accuracy")
    assert [ax.get_ylabel() for ax in many.axes] == ["training loss"] * 2 + ["test accuracy"] * 2
    one = plots.training_curves(*run_of(1), "accuracy")
    assert [ax.get_ylabel() for ax in one.axes] == ["test accuracy"] * 2
    assert all(float(tick).is_integer() for tick in one.axes[0].get_xticks())  # no 0.2 steps


def test_a_curve_of_one_point_is_a_marker_in_grey_too():
    names = [f"method{k}" for k in range(12)]  # the slowest takes 12 times the fastest: log axis
    figure = plots.training_curves(*run_of(1, names), "accuracy")
    against_time = figure.axes[1].get_lines()
    assert len(against_time) == 12
    assert all(len(line.get_xdata()) == 1 for line in against_time)
    assert all(line.get_marker() not in ("", "None", None) for line in against_time)


@pytest.mark.parametrize(("ratio", "panels"), [(8.0, 2), (float("nan"), 1)])
def test_cost_has_no_empty_panel(ratio, panels):
    summary = pd.DataFrame(
        {"optimizer": ["kfac"], "final": [0.9], "final_sd": [0.1], "ratio_to_sgd": [ratio]}
    )
    assert len(plots.training_cost(summary, "accuracy").axes) == panels


def test_a_table_without_steps_has_no_step_in_its_picture():
    # a model that was trained by hand is not at step 0; `compare(..., step=50)` says where it is
    one = frame()[lambda rows: rows["step"] == 0]
    assert [ax.get_title() for ax in plots.error(one).axes] == [""]
    assert [ax.get_title() for ax in plots.error(one.assign(step=50)).axes] == ["step 50"]


def test_error_takes_layers_labels_palette_size_and_axes():
    from matplotlib.figure import Figure

    figure = plots.error(
        frame(), layers=["2", "0"], labels={"kfac": "K-FAC (ours)"}, palette={"kfac": "#ff0000"},
        size=(5, 3),
    )  # fmt: skip
    assert tuple(figure.get_size_inches()) == (5, 3)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["2", "0"]
    named = {handle.get_label(): handle for handle in figure.legends[0].legend_handles}
    assert to_hex(named["K-FAC (ours)"].get_color()) == "#ff0000"
    assert named["K-FAC (ours)"].get_marker() == theme.look("kfac").marker
    own = Figure()
    ax = own.subplots()
    assert plots.error(frame(), ax=ax) is own and ax.get_title() == "step 5" and ax.get_legend()
    with pytest.raises(ValueError, match="no layer '7'; it has 0, 1, 2"):
        plots.error(frame(), layers=["7"])


def test_equal_methods_are_one_line_and_outliers_an_arrow():
    table = frame()
    twin = table[table.approximation == "kfac"].assign(approximation="kfac_reduce")
    far = table[table.approximation == "kfac"].assign(approximation="sngd", relative_error=41.7)
    figure = plots.error(pd.concat([table, twin, far]))
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "kfac = kfac_reduce" in named and "sngd (to 41.7)" in named
    assert "kfac" not in named
    for ax in figure.axes:
        drawn = lines(ax)
        assert max(points[:, 1].max() for points in drawn.values()) == 2
        assert len(ax.texts) == 3  # an arrow per layer


def test_beyond_eight_layers_the_error_is_a_heat_map_of_the_frames_values():
    table = frame(layers=9)
    described = {str(k): "Conv2d 16->32 3x3" for k in range(9)}
    figure = plots.error(fl.Comparison(table, {"layers": described}))
    for ax, step in zip(figure.axes, (0, 5), strict=False):
        names = [tick.get_text() for tick in ax.get_xticklabels()]
        values = table[table.step == step].drop_duplicates(["layer", "approximation"])
        wide = values.pivot(index="layer", columns="approximation", values="relative_error")
        (image,) = ax.get_images()
        assert np.allclose(image.get_array().data, wide[names].to_numpy())
    assert figure.axes[0].get_yticklabels()[3].get_text() == "3  Conv2d 16->32 3x3"


def test_a_picture_of_zeros_alone_has_linear_axes():
    zeros = torch.zeros(3)
    nothing = metrics.Convergence(errors=zeros, expected=zeros)
    some = metrics.Convergence(errors=1 / torch.arange(1.0, 4), expected=1 / torch.arange(1.0, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = [plots.eigenvalues({"dead": zeros}), plots.effective_rank({"kfac": {"0": 0.0}})]
        figures += [plots.mc_convergence({"dead": nothing})]
        assert all(f.axes[0].get_yscale() == "linear" for f in figures)
        both = plots.mc_convergence({"dead": nothing, "live": some})
        assert {ax.get_yscale() for ax in both.axes} == {"log"}
