"""Residual networks for small images, with a 3 x 3 stem (He et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fisherlab.models.registry import Spec, register


class BasicBlock(nn.Module):
    """`activation(x' + conv(activation(conv(x))))`, where x' is x, or a 1 x 1 convolution of it."""

    expansion = 1

    def __init__(self, spec: Spec, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(spec, channels, out, 3, stride)
        self.norm1 = spec.normalise(out)
        self.activation1 = spec.activate()
        self.conv2 = _conv(spec, out, out, 3)
        self.norm2 = spec.normalise(out)
        self.activation2 = spec.activate()
        self.shortcut = _shortcut(spec, channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, channels, h, w] -> [n, out, h / stride, w / stride]`."""
        residual = self.activation1(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        return self.activation2(self.shortcut(x) + residual)


class Bottleneck(nn.Module):
    """`activation(x' + conv1(activation(conv3(activation(conv1(x))))))`, 4 x wider ends."""

    expansion = 4

    def __init__(self, spec: Spec, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = self.expansion * out
        self.conv1 = _conv(spec, channels, out, 1)
        self.norm1 = spec.normalise(out)
        self.activation1 = spec.activate()
        self.conv2 = _conv(spec, out, out, 3, stride)
        self.norm2 = spec.normalise(out)
        self.activation2 = spec.activate()
        self.conv3 = _conv(spec, out, wide, 1)
        self.norm3 = spec.normalise(wide)
        self.activation3 = spec.activate()
        self.shortcut = _shortcut(spec, channels, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, channels, h, w] -> [n, 4 out, h / stride, w / stride]`."""
        residual = self.activation1(self.norm1(self.conv1(x)))
        residual = self.activation2(self.norm2(self.conv2(residual)))
        residual = self.norm3(self.conv3(residual))
        return self.activation3(self.shortcut(x) + residual)


class ResNet(nn.Sequential):
    """A stem, stages of blocks of which all but the first halve the image, a linear head."""

    def __init__(
        self,
        spec: Spec,
        widths: Sequence[int],
        depths: Sequence[int],
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
    ) -> None:
        spec.image_size(32)  # any will do, but a vector
        channels = spec.scaled(widths[0])
        stem = [_conv(spec, spec.in_channels, channels, 3), spec.normalise(channels)]
        blocks = list[nn.Module]()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(spec, channels, spec.scaled(width), stride))
                channels = block.expansion * spec.scaled(width)
        super().__init__(
            *stem,
            spec.activate(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, spec.num_classes),
        )


@register
def resnet20(spec: Spec) -> ResNet:
    """Three stages of three blocks, 16 to 64 channels: 0.27 M parameters."""
    return ResNet(spec, (16, 32, 64), (3, 3, 3))


@register
def resnet32(spec: Spec) -> ResNet:
    """Three stages of five blocks, 16 to 64 channels: 0.47 M parameters."""
    return ResNet(spec, (16, 32, 64), (5, 5, 5))


@register
def resnet110(spec: Spec) -> ResNet:
    """Three stages of 18 blocks, 16 to 64 channels: 1.73 M parameters."""
    return ResNet(spec, (16, 32, 64), (18, 18, 18))


@register
def resnet18(spec: Spec) -> ResNet:
    """Four stages of two blocks, 64 to 512 channels: 11.17 M parameters."""
    return ResNet(spec, (64, 128, 256, 512), (2, 2, 2, 2))


@register
def resnet34(spec: Spec) -> ResNet:
    """Four stages of 3, 4, 6, 3 blocks, 64 to 512 channels: 21.28 M parameters."""
    return ResNet(spec, (64, 128, 256, 512), (3, 4, 6, 3))


@register
def resnet50(spec: Spec) -> ResNet:
    """Four stages of 3, 4, 6, 3 bottlenecks, 256 to 2048 channels: 23.52 M parameters."""
    return ResNet(spec, (64, 128, 256, 512), (3, 4, 6, 3), Bottleneck)


def _shortcut(spec: Spec, channels: int, out: int, stride: int) -> nn.Module:
    """Nothing, or a 1 x 1 convolution where the shape changes."""
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(_conv(spec, channels, out, 1, stride), spec.normalise(out))


def _conv(spec: Spec, channels: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    # The bias of a convolution below a batch norm has no effect.
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=not spec.batch_norm)
