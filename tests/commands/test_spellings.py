"""What a user can say of a method on the command line, and what is refused."""

import pytest
import torch
from torch import nn

from fisherlab.blocks import Dense
from fisherlab.experiments.training import SettingsError
from fisherlab.experiments.training.entries import entries, make
from fisherlab.optim.sngd import ReconstructedSGD

CNN = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def made(name, *options):
    (entry,) = entries(name, [f"{name}.{option}" for option in options])
    optimizer = make(entry, CNN, nn.CrossEntropyLoss(), steps_per_epoch=3, epochs=2)
    if not isinstance(optimizer, ReconstructedSGD):
        optimizer.remove()
    return optimizer


# By method and option: the approximation's field that it sets.
FIELDS = [
    ("kfac", "weight_sharing", "reduce"),
    ("kfac", "pi", 0.5),
    ("kfac", "placement", "factorwise"),
    ("tkfac", "weight_sharing", "expand"),
    ("ang", "placement", "factorwise"),
    ("ifang", "rows", 3),
    ("shampoo", "form", "squared"),
    ("mini_block", "shared", True),
]


@pytest.mark.parametrize(("name", "field", "value"), FIELDS)
def test_fields_of_an_approximation_are_options(name, field, value):
    there = made(name).approximation
    found = made(name, f"{field}={str(value).lower()}").approximation
    assert getattr(found, field) == value != getattr(there, field)
    others = {key: v for key, v in vars(there).items() if key != field}
    kept = {k: v for k, v in others.items() if k in ("placement", "weight_sharing", "pi", "rows")}
    assert {key: getattr(found, key) for key in kept} == kept


def test_statistics_follow_from_the_option():
    reduced = made("kfac", "weight_sharing=reduce").approximation
    assert reduced.A == made("kfac_reduce").approximation.A
    inner = made("ekfac", "weight_sharing=reduce").approximation.factors
    assert inner.A == reduced.A


def test_a_rule_takes_all_of_its_arguments():
    blocks = lambda rule: rule.fully_connected_scale({"0": 5.0})  # noqa: E731
    plain = made("tekfac", "damping=trace(0.01)").param_groups[0]["damping"]
    other = made("tekfac", "damping=trace(0.01, 0.1)").param_groups[0]["damping"]
    off = made("tekfac", "damping=trace(0.01, fc_expansion=false)").param_groups[0]["damping"]
    assert (blocks(plain), blocks(other), blocks(off)) == (5.0, 5.0, 1.0)
    fully_connected = {"3": Dense(torch.eye(27).double(), (3, 9))}
    assert plain(fully_connected) == {"3": 1e-3} and other(fully_connected) == {"3": 0.1}
    adaptive = made("kfac", "damping=levenberg_marquardt(0.5, every=3)")
    rule = adaptive.param_groups[0]["damping"]
    assert (rule.share, rule.every) == (0.5, 3)


def test_options_are_those_of_the_preset():
    assert made("sngd", "preset=paper", "root=nystroem", "rank=2", "every=7").every == 7


WRONG = [
    ("tekfac", "damping=trace()", "trace takes vartheta, constant, fc_expansion; got none"),
    ("tekfac", "damping=trace(1,2,3,4)", "each once"),
    ("tekfac", "damping=trace(1,vartheta=2)", "each once"),
    ("tekfac", "damping=trace(-1)", "a finite number >= 0"),
    ("kfac", "damping=relative(nan)", "a finite number >= 0"),
    ("kfac", "weight_sharing=some", "'expand' or 'reduce'"),
    ("kfac", "ema=other", "corrected, averaged, literal"),
    ("kfac", "preset=papr", "stable or paper"),
    ("ifang", "rows=0", "a whole number >= 1"),
    ("ang", "path=line", "sphere, chord, sum"),
    ("sngd", "root=eigh", "unknown sngd option 'root'"),
    ("ekfac", "placement=eigenvalue", "unknown ekfac option 'placement'"),
    ("adamw", "decoupled_weight_decay=true", "unknown adamw option"),
]


@pytest.mark.parametrize(("name", "option", "said"), WRONG)
def test_what_is_wrong_is_refused(name, option, said):
    with pytest.raises(SettingsError, match=said):
        made(name, option)
