"""Models that a user owns, or another library builds: `module:function`, `timm:`, `hf:`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fisherlab.models.registry import ModelError, Spec, scheme
from fisherlab.names import imported


@scheme("")
def function(name: str, rest: str, spec: Spec) -> nn.Module:
    """`module:function` or `file.py:function`, which returns a module.

    It is given those of `num_classes`, `in_channels` and `input_shape` that it names. Its random
    draws are of the run's seed.

    Raises:
        ModelError: there is no such function.
    """
    try:
        build = imported(name)
    except (ImportError, AttributeError, OSError) as error:
        raise ModelError(f"{name}: {error}; give module:function or file.py:function") from None
    shape = () if spec.size is None else spec.size
    known = {
        "num_classes": spec.num_classes,
        "in_channels": spec.in_channels,
        "input_shape": (spec.in_channels, *shape) if len(shape) == 2 else shape,
    }
    taken = inspect.signature(build).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return build(**{key: value for key, value in known.items() if everything or key in taken})


@scheme("timm")
def timm(name: str, rest: str, spec: Spec) -> nn.Module:
    """`timm:resnet18`: an architecture of timm, at random weights.

    Raises:
        ModelError: timm is not installed, has no such model, or cannot make it for these images.
    """
    library = _library("timm", name)
    size = spec.image_size(224)
    options = {"pretrained": False, "num_classes": spec.num_classes, "in_chans": spec.in_channels}
    try:
        try:
            return library.create_model(rest, **options, img_size=size)
        except TypeError:  # a convolutional net of any size
            return library.create_model(rest, **options)
    except Exception as error:
        raise ModelError(f"{name}: {error}; timm.list_models() names what there is") from None


@scheme("hf")
def hf(name: str, rest: str, spec: Spec) -> nn.Module:
    """`hf:FOLDER` or `hf:TYPE`: an architecture of transformers, at random weights.

    FOLDER holds a config.json, as `save_pretrained` writes it; TYPE, such as vit or gpt2, has the
    sizes of its library's defaults. Images are classified; tokens `[n, t]` get the scores
    `[n, classes, t]` of the next word. Nothing is downloaded.

    Raises:
        ModelError: transformers is not installed, or there is no config that fits.
    """
    library, folder = _library("transformers", name), Path(rest).expanduser()
    images = spec.size is not None and len(spec.size) == 2
    try:
        if (folder / "config.json").is_file():
            config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
        elif rest in library.CONFIG_MAPPING:
            config = library.AutoConfig.for_model(rest)
        else:
            raise ValueError(f"{rest} is no folder with a config.json, and no type of transformers")
        if images:
            config.num_labels, config.num_channels = spec.num_classes, spec.in_channels
            config.image_size = spec.size
            return Scores(library.AutoModelForImageClassification.from_config(config))
        config.vocab_size = spec.num_classes
        return Scores(library.AutoModelForCausalLM.from_config(config))
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise ModelError(f"{name}: {error}") from None


class Scores(nn.Module):
    """A model of transformers whose output is the scores, classes on axis 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """`[n, ...] -> [n, classes]`, or `[n, t] -> [n, classes, t]`."""
        scores = self.model(x).logits
        return scores.transpose(1, 2) if scores.ndim == 3 else scores


def check_library(name: str) -> None:
    """Refuse `timm:NAME` or `hf:NAME` whose library does not import.

    Raises:
        ModelError: it names the library.
    """
    _library({"timm": "timm", "hf": "transformers"}[name.partition(":")[0]], name)


def _library(library: str, name: str) -> Any:
    try:
        return __import__(library)
    except Exception as error:  # one that is built for another torch may fail in any way
        raise ModelError(
            f"{name} needs {library}, which does not import ({error}); pip install 'fisherlab[hub]'"
        ) from None
