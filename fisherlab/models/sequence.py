"""Models of token sequences, built of `nn.Linear` maps: LSTM language model, Transformer.

Tokens are int64 `[n, t]`, the vocabulary has `num_classes` words, and the scores come as
`[n, num_classes, t]`, the order in which `nn.CrossEntropyLoss` takes them.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.models.registry import ModelError, Spec, register


class LSTMLayer(nn.Module):
    """An LSTM of two linear maps, both to the four gates stacked; `nn.LSTM` hides them from hooks.

    The input map is called once over all steps, the recurrent one once per step; the bias is the
    input map's. Batch norm, if any, is of that map's outputs over examples and steps (Laurent et
    al. 2016). The state begins at zeros, or where `carry_on` has taken it.
    """

    # `(h, c)` that a pass begins with, None being zeros; `(h, c)` that a pass left, where asked
    given: tuple[Tensor, Tensor] | None = None
    left: tuple[Tensor, Tensor] | None = None
    carries = False

    def __init__(self, features: int, hidden: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.input = nn.Linear(features, 4 * hidden, bias=not batch_norm)
        self.norm = nn.BatchNorm1d(4 * hidden) if batch_norm else None
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, t, features] -> [n, t, hidden]`."""
        driven = self.input(x)
        if self.norm is not None:
            driven = self.norm(driven.flatten(0, 1)).view_as(driven)
        h = c = x.new_zeros(len(x), self.recurrent.in_features)
        if self.given is not None:
            h, c = self.given
        states = []
        for step in driven.unbind(1):
            i, f, g, o = (step + self.recurrent(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        if self.carries:
            self.left = h.detach(), c.detach()
        return torch.stack(states, 1)


class LanguageModel(nn.Module):
    """Embedding, LSTM layers, decoder: the scores of the next word at every step."""

    def __init__(self, vocabulary: int, hidden: int, layers: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.Sequential(*[LSTMLayer(hidden, hidden, batch_norm) for _ in range(layers)])
        self.decoder = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, t] -> [n, vocabulary, t]`."""
        return self.decoder(self.layers(self.embedding(tokens))).transpose(1, 2)


def forget(model: nn.Module) -> int:
    """Let the LSTMs of a model begin at zeros, and remember from now on; how many there are."""
    layers = [module for module in model.modules() if isinstance(module, LSTMLayer)]
    for layer in layers:
        layer.given, layer.left, layer.carries = None, None, True
    return len(layers)


def carry_on(model: nn.Module) -> None:
    """Let the next pass begin with the state that the last one left; no gradient goes back."""
    for module in model.modules():
        if isinstance(module, LSTMLayer):
            module.given = module.left


@partial(register, batch_norm=False)
def lstm(spec: Spec, *, layers: int = 2) -> LanguageModel:
    """A language model with `layers` LSTMs of 200 units."""
    _check_positive(layers=layers)
    return LanguageModel(spec.num_classes, spec.scaled(200), layers, spec.batch_norm)


class Attention(nn.Module):
    """Attention of several heads: `softmax(q k^T / sqrt(d)) v`, each of the four maps a Linear."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(features, features)
        self.k = nn.Linear(features, features)
        self.v = nn.Linear(features, features)
        self.out = nn.Linear(features, features)

    def forward(self, x: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        """Queries `x [n, t, d]` on `context [n, s, d]`; True in `hidden [n, 1, t | 1, s]` hides."""
        q, k, v = self._split(self.q(x)), self._split(self.k(context)), self._split(self.v(context))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        # Not -inf: a sentence of padding alone would become NaN.
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TransformerLayer(nn.Module):
    """Attention to itself, to a context if `cross`, and two linear maps; each behind a LayerNorm.

    The norm comes first ("pre-norm"): the original order needs a learning rate that warms up.
    """

    def __init__(self, spec: Spec, features: int, heads: int, *, cross: bool) -> None:
        super().__init__()
        inner = spec.scaled(2048)
        self.norm = nn.LayerNorm(features)
        self.attention = Attention(features, heads)
        self.cross_norm = nn.LayerNorm(features) if cross else None
        self.cross_attention = Attention(features, heads) if cross else None
        self.feed_norm = nn.LayerNorm(features)
        self.feed = nn.Sequential(
            nn.Linear(features, inner), spec.activate(), nn.Linear(inner, features)
        )

    def forward(
        self,
        x: Tensor,
        hidden: Tensor,
        context: Tensor | None = None,
        context_hidden: Tensor | None = None,
    ) -> Tensor:
        """`[n, t, d] -> [n, t, d]`."""
        y = self.norm(x)
        x = x + self.attention(y, y, hidden)
        if self.cross_attention is not None and self.cross_norm is not None:
            assert context is not None and context_hidden is not None
            x = x + self.cross_attention(self.cross_norm(x), context, context_hidden)
        return x + self.feed(self.feed_norm(x))


class Transformer(nn.Module):
    """Encoder and decoder with one vocabulary; one tensor holds the source and then the target.

    Both have the same length, so a training loop or a capture needs only `model(x)`. `x [n, 2 t]`
    is the source and then the target from its first mark on; token 0 is padding.
    """

    def __init__(self, spec: Spec, features: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.num_classes, features)
        # At this size the scaled embeddings weigh as much as the positions.
        nn.init.normal_(self.embedding.weight, std=features**-0.5)
        self.encoder = nn.ModuleList(
            TransformerLayer(spec, features, heads, cross=False) for _ in range(layers)
        )
        self.encoder_norm = nn.LayerNorm(features)
        self.decoder = nn.ModuleList(
            TransformerLayer(spec, features, heads, cross=True) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(features)
        self.output = nn.Linear(features, spec.num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, 2 t] -> [n, vocabulary, t]`: the scores of the target's next word."""
        if tokens.shape[1] % 2:
            raise ModelError(
                f"the transformer takes source and target of one length, [n, 2 t]; got a batch of "
                f"shape {tuple(tokens.shape)}"
            )
        source, target = tokens.chunk(2, 1)
        return self.decode(target, *self.encode(source)).transpose(1, 2)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[n, s]` as the decoder's context `[n, s, d]` and its padding `[n, 1, 1, s]`."""
        padding = (source == 0)[:, None, None, :]
        context = self._embedded(source)
        for layer in self.encoder:
            context = layer(context, padding)
        return self.encoder_norm(context), padding

    def decode(self, target: Tensor, context: Tensor, padding: Tensor) -> Tensor:
        """Tokens `[n, t]` from the first mark on -> `[n, t, vocabulary]`, each one word ahead."""
        t = target.shape[1]
        future = torch.ones(t, t, dtype=torch.bool, device=target.device).triu(1)[None, None]
        x = self._embedded(target)
        for layer in self.decoder:
            x = layer(x, future, context, padding)
        return self.output(self.decoder_norm(x))

    def _embedded(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return x * math.sqrt(x.shape[-1]) + _positions(x)


@partial(register, batch_norm=None)
def transformer(spec: Spec, *, layers: int = 6, heads: int = 8) -> Transformer:
    """Encoder and decoder of 512 features, 2048 inside, 8 heads, 6 + 6 layers (Vaswani 2017).

    `width` scales the features and the inside; the features are rounded to a multiple of `heads`.
    """
    _check_positive(layers=layers, heads=heads)
    features = 2 * heads * max(1, round(spec.scaled(512) / (2 * heads)))
    return Transformer(spec, features, heads, layers)


def _positions(x: Tensor) -> Tensor:
    """Sines and cosines `[t, d]` of the positions of `x [n, t, d]`, in its dtype."""
    t, d = x.shape[1:]
    rates = torch.exp(torch.arange(0, d, 2, device=x.device) * (-math.log(10_000.0) / d))
    angles = torch.arange(t, device=x.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).to(x.dtype)


def _check_positive(**numbers: int) -> None:
    for key, value in numbers.items():
        if not doors.is_whole(value) or value < 1:
            raise ModelError(f"{key} must be positive, got {doors.said(value)}")
