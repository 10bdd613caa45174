"""Colours that every reader keeps apart: simulated colour blindness, contrast on white."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from fisherlab import approximations
from fisherlab.optim.create import names
from fisherlab.plots import theme

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
}  # fmt: skip
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(colour):
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(colour, sight):
    xyz = TO_XYZ @ np.clip(np.array(SIGHT[sight]) @ linear(colour), 0, 1) / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(colour):
    return 1.05 / (linear(colour) @ TO_XYZ[1] + 0.05)


COLOURS = {name: colour for name, (colour, *_) in theme.LOOKS.items()}
COLOURS |= {f"spare {k}": colour for k, colour in enumerate(theme.SPARE)}


def near(names, sight, least):
    """Pairs of names whose colours differ by less than `least`."""
    places = {name: lab(COLOURS[name], sight) for name in names}
    apart = {
        (one, two): float(np.linalg.norm(places[one] - places[two]))
        for one, two in itertools.combinations(places, 2)
    }
    return {pair: distance for pair, distance in apart.items() if distance < least}


@pytest.mark.parametrize("sight", SIGHT)
def test_any_two_names_are_kept_apart(sight):
    assert not near(COLOURS, sight, 8.9)


@pytest.mark.parametrize("sight", SIGHT)
def test_methods_are_kept_apart_by_colour_and_neighbours_by_their_dash(sight):
    methods = approximations.names()
    assert not near(methods, sight, 12.7)
    assert not near(["exact", "kfac", "ekfac", "tkfac", "tekfac"], sight, 28.0)
    dashes = {name: theme.look(name).dash for name in methods}
    for dash in theme.DASHES:
        assert not near([name for name in methods if dashes[name] == dash], sight, 20.0)


def test_every_colour_is_seen_on_white():
    assert contrast("#ffffff") == pytest.approx(1) and contrast("#000000") == pytest.approx(21)
    assert not {name: c for name, c in COLOURS.items() if contrast(c) < 3}


def test_every_method_and_optimizer_has_a_look_of_its_own():
    assert {*approximations.names(), *names()} <= set(theme.LOOKS)
