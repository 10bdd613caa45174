"""Small transformers with one block: classifiers of rows of images, a causal language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fisherlab.models.registry import Spec
from fisherlab.models.sequence import TransformerLayer

# features inside a layer at width 1
INSIDE = 2048


class Classifier(nn.Module):
    """A transformer over the rows of an image, pooled by a class token or by the mean."""

    def __init__(
        self, rows: int, columns: int, classes: int, features: int, pool: str, heads: int = 2
    ) -> None:
        super().__init__()
        self.pool = pool
        self.embed = nn.Linear(columns, features)
        extra = int(pool == "token")
        self.token = nn.Parameter(0.02 * torch.randn(extra, features))
        self.places = nn.Parameter(0.02 * torch.randn(rows + extra, features))
        self.layer = TransformerLayer(_spec(classes, features), features, heads, cross=False)
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 1, rows, columns] -> [n, classes]`."""
        x = self.embed(x.squeeze(1))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        nothing = torch.zeros(1, 1, 1, x.shape[1], dtype=torch.bool, device=x.device)
        x = self.norm(self.layer(x, nothing))
        return self.head(x[:, 0] if self.pool == "token" else x.mean(1))


class CausalModel(nn.Module):
    """One decoder block: the scores of the next word at every step."""

    def __init__(self, vocabulary: int, steps: int, features: int, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)
        self.places = nn.Parameter(0.02 * torch.randn(steps, features))
        self.layer = TransformerLayer(_spec(vocabulary, features), features, heads, cross=False)
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, t] -> [n, vocabulary, t]`."""
        t = tokens.shape[1]
        future = torch.ones(t, t, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
        x = self.layer(self.embedding(tokens) + self.places[:t], future)
        return self.head(self.norm(x)).transpose(1, 2)


def _spec(classes: int, features: int) -> Spec:
    """A spec whose layers are four times as wide inside as outside."""
    return Spec(classes, 1, None, 4 * features / INSIDE, False, "relu")
