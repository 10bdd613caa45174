"""Options of an optimizer's parts, spelled flat: `kl_clip=1e-3` is `clip=Clip(kl=1e-3)`.

Presets, the command line and parameter groups name single options, so both spellings are accepted
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fisherlab import doors
from fisherlab.optim.schedule import Schedule
from fisherlab.optim.step import Clip

PARTS: dict[str, type] = {"schedule": Schedule, "clip": Clip}

# a flat name -> the parts that have it, and the field of each
FLAT = {
    "statistics_every": {"schedule": "statistics"},
    "basis_every": {"schedule": "basis"},
    "corrections_every": {"schedule": "corrections"},
    "decay": {"schedule": "decay"},
    "ema": {"schedule": "ema"},
    "statistics_examples": {"schedule": "examples"},
    "warmup": {"schedule": "warmup", "clip": "warmup"},
    "kl_clip": {"clip": "kl"},
    "max_norm": {"clip": "norm"},
}


def gathered(options: dict[str, Any]) -> dict[str, Any]:
    """The options with each flat one inside its part.

    Args:
        options: the options, with a `Schedule` and a `Clip` if the optimizer has such parts. A flat
            option of a missing part stays as it is.

    Raises:
        TypeError: a part is something else.
    """
    found = dict(options)
    for part in PARTS.keys() & options.keys():
        check_part(part, options[part])
    for key in (key for key in options if FLAT.get(key, {}).keys() & options.keys()):
        value = found.pop(key)
        for part, field in FLAT[key].items():
            if part in found:
                found[part] = replace(found[part], **{field: value})
    return found


def check_part(part: str, value: object) -> None:
    """Refuse what is no `Schedule`, or no `Clip`."""
    if not isinstance(value, PARTS[part]):
        raise TypeError(
            f"{part} is a fl.optim.{PARTS[part].__name__}(...), got {doors.said(value)}"
        )


def flat_names(parts: Iterable[str]) -> list[str]:
    """The flat names of the fields of some parts."""
    return [key for key, places in FLAT.items() if places.keys() & set(parts)]
