"""Per-example gradients straight from images, against those from the patches."""

import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.blocks import contractions
from fisherlab.blocks.columns import Columns
from fisherlab.extract.image import ImageColumns

OPTIONS = [
    {"padding": 1},
    {"padding": 1, "bias": False},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": (2, 0)},
    {"padding": 1, "groups": 2},
    {"padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
# with one channel in a group the exact Fisher has rows enough for patches, a few at a time
@pytest.mark.parametrize("channels", [1, 2])
def test_columns_of_images_are_the_columns_of_their_patches(
    options: dict,
    fisher_type: str,
    channels: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channels *= options.get("groups", 1)
    monkeypatch.setattr(contractions, "IN_FLIGHT", 20_000)
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 4, (3, 3), **options)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(5, channels, 9, 7, generator=generator, dtype=torch.float64)
    model(x)
    y = torch.tensor([0, 1, 2, 0, 1])
    layers = fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type=fisher_type)
    convolutions = [layer for layer in layers.values() if layer.layer_type == "Conv2d"]
    assert len(convolutions) == options.get("groups", 1)
    for layer in convolutions:
        found, expected = ImageColumns.of(layer), Columns(layer.inputs, layer.output_gradients)
        assert found is not None
        D = torch.einsum("mnto,nti->mnoi", expected.g, expected.a).flatten(0, 1)
        o, i = layer.shape
        Q_G = torch.linalg.qr(torch.randn(o, o, generator=generator, dtype=torch.float64)).Q
        Q_A = torch.linalg.qr(torch.randn(i, i, generator=generator, dtype=torch.float64)).Q
        pairs: list[tuple[Tensor, Tensor]] = [
            (found.matrices, D),
            (found.gram, expected.gram),
            (found.left, expected.left),
            (found.right, expected.right),
            (found.squares, expected.squares),
            (found.energies, expected.energies),
            (found.trace, expected.trace),
            (found.rotated_squares(Q_G, Q_A), expected.rotated_squares(Q_G, Q_A)),
            (found.combine(torch.ones_like(found.energies)), D.sum(0)),
        ]
        assert found.shape == expected.shape and found.count == expected.count
        assert "a" not in vars(found), "the patches were made"
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_patches_that_take_less_room_than_gradients_are_kept(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(2, 16, 3, stride=4), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(4, 2, 8, 8, generator=generator)
    model(x)
    layers = fl.capture(model, nn.CrossEntropyLoss(), x, torch.tensor([0, 1, 2, 0]))
    assert all(ImageColumns.of(layer) is None for layer in layers.values())
