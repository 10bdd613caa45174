"""One seed gives one table: run again, asked for in another order, computed by two threads."""

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.experiments.columns import CLOCKS, MEANING, steady
from fisherlab.experiments.training import COLUMNS, Settings, entries, train

METHODS = ["diagonal", "kfac", "ekfac", "tkfac", "shampoo"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 2, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.arange(40) % 3


def compared(methods=METHODS, layers=None):
    torch.manual_seed(0)
    conv, rest = nn.Conv2d(2, 4, 2), [nn.Tanh(), nn.Flatten(), nn.Linear(64, 6)]
    model = nn.Sequential(conv, *rest, nn.Tanh(), nn.Linear(6, 3)).double()
    options = {"approximations": methods, "layers": layers, "fisher_type": "mc"}
    table = fl.compare(model, nn.CrossEntropyLoss(), *batch(), reference=batch(2), **options)
    return steady(table.frame)


def by_row(frame):
    return frame.set_index(["layer", "approximation", "damping_relative"]).sort_index()


def assert_near(one, two, digits):
    """Sums that are added in another order agree to some digits, of numbers above 1."""
    for name in one.select_dtypes("number"):
        size = one[name].abs().clip(lower=1.0)
        assert (one[name].isna() == two[name].isna()).all(), name
        assert not ((one[name] - two[name]).abs() / size > 10.0**-digits).any(), name


def test_a_second_comparison_has_the_same_bytes():
    assert compared().to_csv() == compared().to_csv()


def test_a_second_training_has_the_same_bytes(tmp_path):
    small = {"data": "digits", "hidden": (4,), "examples": 96, "test_examples": 50, "epochs": 2}
    methods = entries("kfac,fngd,soap,sgd", ())
    settings = Settings(**small, batch_size=32, entries=methods)
    runs = [train(settings, tmp_path / name) for name in "ab"]
    first, second = (steady(run.rows).to_csv() + steady(run.curve).to_csv() for run in runs)
    assert first == second and len(first) > 500


def test_the_order_of_layers_changes_no_bit_and_that_of_methods_no_twelfth_digit():
    forth, back = compared(), compared(layers=["5", "3", "0"])
    assert by_row(forth).to_csv() == by_row(back).to_csv()
    back = compared(METHODS[::-1])
    assert list(forth["approximation"]) != list(back["approximation"])
    assert_near(by_row(forth), by_row(back), 12)


def test_two_threads_agree_to_nine_digits():
    one = by_row(compared())
    torch.set_num_threads(2)
    assert_near(one, by_row(compared()), 9)


def test_every_column_of_seconds_or_of_a_process_is_a_clock():
    for name, meaning in {**MEANING, **COLUMNS}.items():
        clock = any(word in name for word in CLOCKS)
        measured = any(word in meaning for word in ("seconds", "time to", "time of", "peak of"))
        assert clock or not measured, name
