"""Feed-forward models as plain `nn.Sequential`s, which BackPACK can take: every layer a module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from torch import nn

from fisherlab import doors
from fisherlab.models.registry import ModelError, Spec, register

VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
VGG16 = (64, 64, "pool", 128, 128, "pool", *[256] * 3, "pool", *([512] * 3 + ["pool"]) * 2)


@partial(register, batch_norm=False)
def mlp(spec: Spec, *, hidden: Sequence[int] = (64, 64)) -> nn.Sequential:
    """`features -> hidden ... -> num_classes`; inputs `[n, ...]` are flattened.

    `hidden` holds the widths before `width` multiplies them; none is a linear model.
    """
    features = [_features(spec, "mlp"), *_hidden(spec, hidden)]
    return nn.Sequential(
        nn.Flatten(), *_dense(spec, features), nn.Linear(features[-1], spec.num_classes)
    )


@partial(register, batch_norm=None)
def autoencoder(
    spec: Spec, *, hidden: Sequence[int] = (1000, 500, 250), code: int = 30
) -> nn.Sequential:
    """`features -> hidden -> code -> hidden backwards -> features` (Hinton & Salakhutdinov 2006).

    The code is linear, the output `[n, features]` has no activation: its target is the flattened
    input, for squared error or, as logits, binary cross entropy. `num_classes` is not used.
    """
    code = doors.count(code, "code", error=ModelError)
    outer = [_features(spec, "autoencoder"), *_hidden(spec, hidden)]
    inner = spec.scaled(code)
    decoder = [inner, *reversed(outer[1:])]
    return nn.Sequential(
        nn.Flatten(),
        *_dense(spec, outer),
        nn.Linear(outer[-1], inner),
        *_dense(spec, decoder),
        nn.Linear(decoder[-1], outer[0]),
    )


@partial(register, batch_norm=None)
def lenet(spec: Spec) -> nn.Sequential:
    """Two 5 x 5 convolutions of 16 and 32 channels, then 120, 84, num_classes.

    The convolutions keep the size and two poolings halve it: 3 x 32 x 32, the default, gives 2048
    features, 1 x 28 x 28 gives 1568.
    """
    height, width = spec.image_size(32)
    if min(height, width) < 4:
        raise ModelError(f"lenet halves its input twice; {height} x {width} is below 4 x 4")
    first, second = spec.scaled(16), spec.scaled(32)
    features = [second * (height // 4) * (width // 4), spec.scaled(120), spec.scaled(84)]
    return nn.Sequential(
        nn.Conv2d(spec.in_channels, first, 5, padding=2),
        spec.activate(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5, padding=2),
        spec.activate(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *_dense(spec, features),
        nn.Linear(features[-1], spec.num_classes),
    )


@register
def vgg11(spec: Spec) -> nn.Sequential:
    """Eight 3 x 3 convolutions and one linear layer (Simonyan & Zisserman 2015, for CIFAR)."""
    return _vgg(spec, VGG11)


@register
def vgg16(spec: Spec) -> nn.Sequential:
    """Thirteen 3 x 3 convolutions and one linear layer (Simonyan & Zisserman 2015, for CIFAR)."""
    return _vgg(spec, VGG16)


def _vgg(spec: Spec, plan: Sequence[int | str]) -> nn.Sequential:
    height, width = spec.image_size(32)
    channels, layers = spec.in_channels, list[nn.Module]()
    for step in plan:
        if isinstance(step, int):
            # The bias of a convolution below a batch norm has no effect.
            conv = nn.Conv2d(channels, spec.scaled(step), 3, padding=1, bias=not spec.batch_norm)
            channels = conv.out_channels
            normalise = [nn.BatchNorm2d(channels)] if spec.batch_norm else []
            layers += [conv, *normalise, spec.activate()]
        elif min(height, width) >= 2:  # small images run out of pixels before the plan does
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
    features = channels * height * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, spec.num_classes))


def _features(spec: Spec, name: str) -> int:
    if spec.size is None:
        raise ModelError(f"{name} needs input_size: the shape of one example, such as (1, 28, 28)")
    channels = spec.in_channels if len(spec.size) == 2 else 1
    return channels * math.prod(spec.size)


def _hidden(spec: Spec, hidden: Sequence[int]) -> list[int]:
    for features in doors.listed(hidden, "hidden", error=ModelError):
        if doors.real(features) is None or float(features) != int(features) or features < 1:
            raise ModelError(f"hidden must hold positive widths, got {doors.said(hidden)}")
    return [spec.scaled(features) for features in hidden]


def _dense(spec: Spec, features: Sequence[int]) -> Iterator[nn.Module]:
    for i, o in pairwise(features):
        # a bias below a batch norm has no effect
        yield nn.Linear(i, o, bias=not spec.batch_norm)
        if spec.batch_norm:
            yield nn.BatchNorm1d(o)
        yield spec.activate()
