"""Architectures in plain torch, as people write them by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.table import Problem, architecture

EXAMPLES = 4


def tokens(length: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (EXAMPLES, length))


def classes(count: int) -> Tensor:
    return torch.arange(EXAMPLES) % count


def sequences(length: int, width: int) -> Tensor:
    return torch.randn(EXAMPLES, length, width, dtype=torch.float64)


def images(channels: int, size: int) -> Tensor:
    return torch.randn(EXAMPLES, channels, size, size, dtype=torch.float64)


def scores(model: nn.Module, x: Tensor) -> Tensor:
    """The scores of every position with the class as second axis."""
    return model(x).mT


class AddmmLinear(nn.Module):
    """A linear map that stores its weight as `[i, o]`."""

    def __init__(self, i, o):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, o) / math.sqrt(i))
        self.bias = nn.Parameter(torch.randn(o) / 10)

    def forward(self, x):
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.shape[:-1], -1)


class CausalBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = AddmmLinear(width, 3 * width), AddmmLinear(width, width)
        self.c_fc, self.c_out = AddmmLinear(width, 4 * width), AddmmLinear(4 * width, width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class TiedLanguageModel(nn.Module):
    """GPT-2's layout: learned positions, addmm layers, a head that is the embedding."""

    def __init__(self, vocabulary=20, width=16, length=6):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([CausalBlock(width, 2) for _ in range(2)])
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]).expand(ids.shape))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


@architecture("causal transformer, addmm, tied head", share=0.999, quick=True)
def addmm():
    ids = tokens(7, 20)
    return Problem(TiedLanguageModel(), ids[:, :-1], ids[:, 1:], nn.CrossEntropyLoss(), scores)


class Encoder(nn.Module):
    """torch's encoder layer under a linear head."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x if self.batch_first else x.transpose(0, 1))
        return self.head(self.layer(x).mean(1 if self.batch_first else 0))


@architecture("TransformerEncoderLayer, batch first", share=0.999, exact=True, quick=True)
def batch_first():
    return Problem(Encoder(True), sequences(4, 5), classes(3), nn.CrossEntropyLoss())


@architecture("TransformerEncoderLayer, time first", share=0.999, exact=True, quick=True)
def time_first():
    # as many steps as examples: no shape tells one axis from the other
    return Problem(Encoder(False), sequences(4, 5), classes(3), nn.CrossEntropyLoss())


class CrossAttention(nn.Module):
    """Queries attend to keys and values of other widths."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, q, k, v):
        return self.head(self.attention(q, k, v, need_weights=False)[0].mean(1))


@architecture("MultiheadAttention, kdim and vdim", share=0.999, exact=True, quick=True)
def cross_attention():
    x = sequences(3, 8), sequences(5, 5), sequences(5, 6)
    return Problem(
        CrossAttention(), x, classes(3), nn.CrossEntropyLoss(), lambda model, x: model(*x)
    )


class Windows(nn.Module):
    """Attention inside windows, which are folded into the batch axis, as in Swin."""

    def __init__(self, width=8, window=2):
        super().__init__()
        self.window = window
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.proj, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, d = x.shape
        s = self.window
        rows = x.view(n, h // s, s, w // s, s, d).transpose(2, 3).reshape(-1, s * s, d)
        q, k, v = self.qkv(self.norm(rows)).chunk(3, -1)
        rows = rows + self.proj((q @ k.mT / math.sqrt(d)).softmax(-1) @ v)
        x = rows.view(n, h // s, w // s, s, s, d).transpose(2, 3).reshape(n, h, w, d)
        return self.head(x.mean((1, 2)))


@architecture("window attention", share=0.999, exact=True, quick=True)
def windows():
    return Problem(Windows(), images(3, 8), classes(3), nn.CrossEntropyLoss())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


@architecture("LSTM classifier", share=0.256, exact=True, quick=True)
def lstm():
    return Problem(Recurrent(), tokens(6, 12), classes(3), nn.CrossEntropyLoss())


class Residual(nn.Module):
    """Two convolutions with batch normalisation around a strided shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(out + self.shortcut(x)).mean((2, 3)))


@architecture("residual block, batch norm", share=0.999, exact=True, quick=True)
def residual():
    return Problem(Residual(), images(3, 8), classes(3), nn.CrossEntropyLoss())


class UNet(nn.Module):
    """One level down by a strided convolution, and up by a transposed one."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Conv2d(2, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        high = F.relu(self.inside(x))
        low = F.relu(self.norm(self.down(high)))
        return self.out(torch.cat([high, self.up(low)], 1))


@architecture("U-Net", share=0.999, quick=True)
def unet():
    y = torch.randint(3, (EXAMPLES, 8, 8))
    return Problem(UNet(), images(2, 8), y, nn.CrossEntropyLoss())


class LowRank(nn.Module):
    """A frozen linear map plus a product of two narrow ones."""

    def __init__(self, i, o, rank=2):
        super().__init__()
        self.base = nn.Linear(i, o).requires_grad_(False)
        self.A, self.B = nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)

    def forward(self, x):
        return self.base(x) + 4 * self.B(self.A(x))


@architecture("low-rank adapter on a frozen base", share=0.999, exact=True, quick=True)
def low_rank():
    model = nn.Sequential(LowRank(6, 10), nn.Tanh(), LowRank(10, 8), nn.Tanh(), nn.Linear(8, 3))
    return Problem(model, sequences(1, 6)[:, 0], classes(3), nn.CrossEntropyLoss())


class RootMeanSquareNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class RotaryBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RootMeanSquareNorm(width), RootMeanSquareNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def rotated(self, x):
        half = x.shape[-1] // 2
        time = torch.arange(x.shape[-2], dtype=x.dtype)
        angle = time[:, None] / 100.0 ** (torch.arange(half, dtype=x.dtype) / half)
        one, two = x.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    def forward(self, x):
        n, t, d = x.shape
        h = self.norm1(x)
        q, k, v = (
            f(h).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(n, t, d))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class RotaryLanguageModel(nn.Module):
    """Llama's layout: RMSNorm, rotary attention, gated MLP, a head of its own."""

    def __init__(self, vocabulary=20, width=16):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(RotaryBlock(width, 2), RotaryBlock(width, 2))
        self.norm, self.head = RootMeanSquareNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids))))


@architecture("causal transformer, rotary, gated", share=0.999, quick=True)
def rotary():
    ids = tokens(7, 20)
    return Problem(RotaryLanguageModel(), ids[:, :-1], ids[:, 1:], nn.CrossEntropyLoss(), scores)


class Experts(nn.Module):
    """Each position goes to its best two experts, which see their positions as one list."""

    def __init__(self, width=6, count=3):
        super().__init__()
        self.embed, self.router = nn.Linear(5, width), nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(count)])
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x)
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for k, expert in enumerate(self.experts):
            at, slot = torch.where(chosen == k)
            out = out.index_add(0, at, weights[at, slot, None] * torch.tanh(expert(rows[at])))
        return self.head((rows + out).view(x.shape).mean(1))


@architecture("mixture of experts, index routing", share=0.999, exact=True, quick=True)
def experts():
    return Problem(Experts(), sequences(6, 5), classes(3), nn.CrossEntropyLoss())
