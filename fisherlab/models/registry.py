"""The registry of models, and `create`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fisherlab import doors
from fisherlab.names import Registry, unknown

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "identity": nn.Identity,
}


class ModelError(ValueError):
    """A model that is unknown, or arguments that make none."""


# The most features of a hidden layer; torch fails inside far above it.
WIDEST = 2**24


@dataclass(frozen=True)
class Spec:
    """The arguments that every model gets; each uses those it needs."""

    num_classes: int
    in_channels: int
    size: tuple[int, ...] | None  # one example's, no channels; None: the model's default
    width: float
    batch_norm: bool
    activation: str

    def scaled(self, features: int) -> int:
        """A number of features times the width, at least 1."""
        if features > WIDEST or self.width * features > WIDEST:
            raise ModelError(
                f"{features:,} features times the width {self.width:g} are more than {WIDEST:,}; "
                "pass fewer, or a smaller width"
            )
        return max(1, round(self.width * features))

    def activate(self) -> nn.Module:
        """A new activation module: never in place, and never one module in two places."""
        return ACTIVATIONS[self.activation]()

    def normalise(self, channels: int) -> nn.Module:
        """A batch norm over channels, or nothing."""
        return nn.BatchNorm2d(channels) if self.batch_norm else nn.Identity()

    def image_size(self, default: int) -> tuple[int, int]:
        """Height and width of the images; a vector is refused."""
        height, *rest = self.size or (default, default)
        if len(rest) != 1:
            raise ModelError(
                f"this model takes images, input_size (c, h, w) or (h, w); got {self.size}"
            )
        return height, rest[0]


Builder = Callable[..., nn.Module]
_REGISTRY: Registry[Builder] = Registry("model", ModelError)


# Whether a model has batch norm by default, by its name; None: it has none to switch on.
_NORMED: dict[str, bool | None] = {}


def register(builder: Builder | str, *, batch_norm: bool | None = True) -> Any:
    """Enter a function `(spec, *, options) -> module` under its own name, or under a given one.

        @fl.models.register
        def my_net(spec): ...

        @fl.models.register("my_net")
        def build(spec): ...

    Args:
        builder: The function, or the name of the one that is decorated.
        batch_norm: `spec.batch_norm` unless `create` is told; None: the model has none.

    Returns:
        The function; of a name, what enters one.
    """
    if batch_norm is not None:
        doors.flag(batch_norm, "batch_norm", error=ModelError)
    if isinstance(builder, str):
        return partial(_enter, builder, batch_norm=batch_norm)
    if not hasattr(builder, "__name__"):
        raise ModelError(f"builder must be a function of a spec, got {doors.said(builder)}")
    return _enter(builder.__name__, builder, batch_norm)


def _enter(name: str, builder: Builder, batch_norm: bool | None) -> Builder:
    if not callable(builder):
        raise ModelError(f"builder must be a function of a spec, got {doors.said(builder)}")
    known = getattr(_REGISTRY.get(name), "__qualname__", None)
    _REGISTRY.add(name, builder, known == builder.__qualname__)  # made anew in a notebook
    _NORMED[name] = batch_norm
    return builder


# How `scheme:rest` is built: a function of the whole name, of what follows the colon, and a spec.
Scheme = Callable[[str, str, Spec], nn.Module]
_SCHEMES: Registry[Scheme] = Registry("kind of model", ModelError)


def scheme(name: str) -> Callable[[Scheme], Scheme]:
    """Enter a function for models named `name:...`; "" is for every other name with a colon."""
    return _SCHEMES.enter(name)


def check(name: str) -> None:
    """Refuse a name that is neither registered nor a user's own model.

    Args:
        name: a name of `names()`, or one with a colon.

    Raises:
        ModelError: the name is unknown.
    """
    if ":" not in doors.name(name, "name", error=ModelError):
        _REGISTRY.named(name)


def names() -> list[str]:
    """The registered names, sorted.

    Returns:
        Names for `create`.

    Example:
        >>> import fisherlab as fl
        >>> {"mlp", "resnet18"} <= set(fl.models.names())
        True
    """
    return sorted(_REGISTRY)


def create(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    input_size: int | tuple[int, ...] | None = None,
    width: float = 1.0,
    batch_norm: bool | None = None,
    activation: str = "relu",
    generator: torch.Generator | None = None,
    **options: Any,
) -> nn.Module:
    """A model by name, on the CPU, with torch's own initialisation drawn from `generator`.

    The global random state stays as it was.

    Args:
        name: a name of `names()`; or with a colon a user's own model: `module:function`,
            `file.py:function`, `timm:NAME`, `hf:FOLDER`; see `models.own`. It takes neither
            `width`, nor `batch_norm`, nor `activation`.
        num_classes: number of outputs.
        in_channels: channels of an image.
        input_size: the shape of one example: `(c, h, w)`, `(features,)`, or `(h, w)` without
            channels. An int is the number of features of an mlp or autoencoder, elsewhere the side
            of a square image.
        width: multiplies every hidden layer.
        batch_norm: whether the model has batch norm. None: vgg and resnet have it, mlp and lstm do
            not; the others have none.
        activation: the function between layers, such as "relu".
        generator: draws the initial weights; None: a fresh one seeded with 0.
        options: the model's own: `hidden` (mlp, autoencoder), `code` (autoencoder), `layers` (lstm,
            transformer), `heads` (transformer).

    Returns:
        The model, in training mode.

    Raises:
        ModelError: the name, activation or option is unknown, or the sizes make no model.

    Example:
        >>> import torch, fisherlab as fl
        >>> model = fl.models.create("mlp", num_classes=3, input_size=4, hidden=[8])
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """
    doors.name(name, "name", error=ModelError)
    doors.name(activation, "activation", error=ModelError)
    width = doors.number(width, "width", above=0.0, error=ModelError)
    if batch_norm is not None:
        doors.flag(batch_norm, "batch_norm", error=ModelError)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ModelError(f"generator must be a torch.Generator, got {doors.said(generator)}")
    num_classes = doors.count(num_classes, "num_classes", error=ModelError)
    in_channels = doors.count(in_channels, "in_channels", error=ModelError)
    if ":" in name:
        given = {
            "width": width != 1.0,
            "batch_norm": batch_norm,
            "activation": activation != "relu",
        }
        options = {**options, **{option: True for option, is_set in given.items() if is_set}}
        return _own(name, num_classes, in_channels, input_size, options, generator)
    builder = _REGISTRY.named(name)
    _check_options(name, builder, options)
    if activation not in ACTIVATIONS:
        raise ModelError(unknown("activation", activation, sorted(ACTIVATIONS)))
    channels, size = _input_shape(name, in_channels, input_size)
    normed = _NORMED[name] if batch_norm is None else batch_norm
    if normed and _NORMED[name] is None:
        able = ", ".join(sorted(n for n in _REGISTRY if _NORMED[n] is not None))
        raise ModelError(f"{name} has no batch norm; leave batch_norm out, or take {able}")
    spec = Spec(num_classes, channels, size, width, bool(normed), activation)
    return _initialised(lambda: builder(spec, **options), generator)


def _own(
    name: str,
    num_classes: int,
    in_channels: int,
    input_size: int | tuple[int, ...] | None,
    options: dict[str, Any],
    generator: torch.Generator | None,
) -> nn.Module:
    kind, _, rest = name.partition(":")
    build = _SCHEMES[kind if kind in _SCHEMES else ""]
    if options:
        raise ModelError(f"{name} takes no {', '.join(options)}; its own code decides them")
    channels, size = _input_shape(name, in_channels, input_size)
    spec = Spec(num_classes, channels, size, 1.0, False, "relu")
    model = _initialised(lambda: build(name, rest, spec), generator)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} makes a {type(model).__name__}, which is no torch module")
    return model


def _initialised(build: Callable[[], nn.Module], generator: torch.Generator | None) -> nn.Module:
    """The model of `build`, while torch's initialisation draws from the generator's stream."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    # On the CPU, so that one seed is one model whatever the default device is.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: it would reset the streams of the GPUs, which are not forked.
        torch.default_generator.manual_seed(int(seed))
        return build()


def _check_options(name: str, builder: Builder, options: dict[str, Any]) -> None:
    own = list(inspect.signature(builder).parameters)[1:]
    # the options of every model, without `name` and `options` themselves
    known = [*own, *list(inspect.signature(create).parameters)[1:-1]]
    for option in options:
        if option not in own:
            raise ModelError(unknown(f"{name} option", option, known))


def _input_shape(
    name: str, in_channels: int, input_size: int | tuple[int, ...] | None
) -> tuple[int, tuple[int, ...] | None]:
    """The channels and the size without them."""
    if input_size is None:
        return in_channels, None
    size: tuple[int, ...]
    if doors.real(input_size) is not None:
        input_size = doors.count(input_size, "input_size", error=ModelError)
        flat = name in ("mlp", "autoencoder")
        size = (input_size,) if flat else (input_size, input_size)
    else:
        size = tuple(input_size) if isinstance(input_size, tuple | list | torch.Size) else ()
    if not 1 <= len(size) <= 3:
        raise ModelError(
            f"input_size must be an int, (features,), (h, w) or (c, h, w), all positive; "
            f"got {input_size!r}"
        )
    size = tuple(doors.count(n, "each number of input_size", error=ModelError) for n in size)
    if len(size) < 3:
        return in_channels, size
    if in_channels not in (3, size[0]):
        raise ModelError(
            f"in_channels={in_channels} contradicts input_size={input_size!r}; leave one out"
        )
    return size[0], size[1:]
