"""What people pass by mistake in place of a number, a tensor, a block, a function."""

from __future__ import annotations

import random
import warnings

import numpy as np
import torch
from torch import Tensor, nn

WORDS = (None, "kfac", "", "0.1", b"1", [], {}, (), [1, 2], {"a": 1}, object(), Ellipsis, len, int)
NUMBERS = (math_nan := float("nan"), float("inf"), -float("inf"), -1.0, -1e-300)
NO_NUMBERS = (*WORDS, 1j, True, False, torch.ones(2), torch.ones(()) * 1j, np.ones(3))


def number(draw: random.Random, below: float | None = 0.0, zero: bool = False) -> object:
    """No finite number, or one below what is allowed (None: every number is)."""
    found: list[object] = [*NO_NUMBERS, *NUMBERS[:3], torch.tensor(math_nan), np.float64("nan")]
    if below is not None:
        found += [-1, -0.5, -1e-300, torch.tensor(-2.0), np.float32(-1)]
    if zero:
        found += [0, 0.0, torch.zeros(())]
    return draw.choice(found)


def count(draw: random.Random, least: int = 1) -> object:
    """No whole number, or one that is too small."""
    return draw.choice([*NO_NUMBERS, *NUMBERS, least - 1, least - 2, least + 0.5, np.float64(1.5)])


def anything(draw: random.Random, *but: type) -> object:
    """A thing that is none of some types."""
    found = [
        *WORDS,
        1.5,
        3,
        True,
        torch.ones(3, 3),
        np.ones((2, 2)),
        nn.Linear(2, 2),
        torch.float32,
    ]
    return draw.choice([x for x in found if not (but and isinstance(x, but))])


def tensor(draw: random.Random, like: Tensor) -> object:
    """No tensor of real numbers of this shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        like = like.detach().clone()
        shape = list(like.shape)
        taller = [*shape[:-1], shape[-1] + 1] if shape else [2]
        makers = [
            *(lambda word=word: word for word in (*WORDS, 1.5, 3, True)),
            lambda: like.numpy(),
            lambda: like.tolist(),
            lambda: like.to(torch.int64),
            lambda: like.bool(),
            lambda: like.to(torch.complex128),
            lambda: like.half(),
            lambda: like.bfloat16(),
            lambda: like.to_sparse(),
            lambda: torch.nested.nested_tensor([like, like]),
            lambda: torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8),
            lambda: like.to("meta"),
            lambda: like.new_ones(taller),
            lambda: like.new_ones(()) if shape else like.new_ones(3),
            lambda: like[None].repeat(2, *([1] * len(shape))),
            lambda: like.new_ones([0, *shape[1:]]) if shape else like.new_ones(0),
            lambda: nn.UninitializedParameter(),
        ]
        return draw.choice(makers)()
