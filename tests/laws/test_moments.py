"""Sums over patches that never form the patches, against the patches."""

import pytest
import torch
from torch import nn

from fisherlab.blocks.contractions import second_moment
from fisherlab.extract import geometry as module
from fisherlab.extract.geometry import Geometry
from fisherlab.extract.moments import patch_moment


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(5, 5), (1, 1), (2, 7), (1, 4)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_correlated_moment_is_the_moment_of_patches(
    kernel: int,
    size: tuple[int, int],
    groups: int,
    bias: bool,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PAIR", 0)
    conv = nn.Conv2d(4, 6, kernel, padding=kernel // 2, groups=groups, bias=bias)
    x = torch.randn(3, 4, *size, generator=generator, dtype=torch.float64)
    for group in range(groups):
        geometry = Geometry.of(conv, bias, group)
        assert geometry.conv is not None and geometry.conv.plain
        expected = second_moment(geometry.inputs(x))
        torch.testing.assert_close(geometry.input_moment(x), expected, rtol=1e-12, atol=1e-12)


def test_small_batches_form_their_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(
        module, "patch_moment", lambda *args: used.append(args) or patch_moment(*args)
    )
    geometry = Geometry.of(nn.Conv2d(16, 3, 5, padding=2), True)
    few = geometry.input_moment(torch.ones(8, 16, 8, 8))
    assert not used
    many = geometry.input_moment(torch.ones(128, 16, 8, 8))
    assert used
    torch.testing.assert_close(16 * few, many)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": 0},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_other_convolutions_form_their_patches(options: dict, generator: torch.Generator) -> None:
    conv = nn.Conv2d(2, 3, 3, **options)
    geometry = Geometry.of(conv, True)
    assert geometry.conv is not None and not geometry.conv.plain
    x = torch.randn(3, 2, 6, 6, generator=generator, dtype=torch.float64)
    expected = second_moment(geometry.inputs(x))
    torch.testing.assert_close(geometry.input_moment(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_sum_of_patches_is_the_patches_of_the_sum(bias: bool, generator: torch.Generator) -> None:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(4, 2, 6, 5, generator=generator, dtype=torch.float64)
    geometry = Geometry.of(conv, bias)
    torch.testing.assert_close(geometry.input_sum(x)[0], geometry.inputs(x).sum((0, 1)))
    linear = Geometry.of(nn.Linear(3, 2), bias)
    x = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(linear.input_sum(x)[0], linear.inputs(x).sum((0, 1)))
    if not bias:
        kept = x.clone()
        linear.input_sum(x)
        assert torch.equal(x, kept)
