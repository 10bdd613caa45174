"""How a case ends: its outcome, told from what was returned or raised and from what it changed."""

from __future__ import annotations

import ast
import functools
import random
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fisherlab as fl

PACKAGE = Path(__file__).parents[2] / "fisherlab"
HERE = Path(__file__).parent
# Where the functions of a user's model pass through.
TAPES = {("extract", "tape"), ("optim", "watch")}
GOOD = ("right", "refused by name", "torch's own error")
NAMED = (ValueError, TypeError, RuntimeError, OSError, KeyError, fl.adapters.AdapterError)
BAD = ("wrong", "junk accepted", "internal error", "changed world")


@dataclass
class Case:
    """One call with hostile arguments.

    Args:
        label: what is passed where.
        call: makes it.
        check: why what it returned is wrong; "" where it is right. None: it had to be refused.
        words: each has to be in the message of a refusal.
        model: the user's model, which must be as before.
        after: why what is left behind is wrong, whatever the outcome; "" where it is not.
    """

    label: str
    call: Callable[[], object]
    check: Callable[[object], str] | None = None
    words: tuple[str, ...] = ()
    model: nn.Module | None = None
    after: Callable[[BaseException | None], str] | None = None


@dataclass
class Verdict:
    """An outcome, and what is to be said of it."""

    label: str
    outcome: str
    detail: str = ""
    trace: str = field(default="", repr=False)

    @property
    def good(self) -> bool:
        return self.outcome in GOOD


def judged(case: Case) -> Verdict:
    """Run a case and judge it."""
    before = World.of(case.model)
    error: BaseException | None = None
    result: object = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = case.call()
        except Exception as raised:
            error = raised
        changed = before.changes(World.of(case.model))
        if not changed and case.after is not None:
            changed = case.after(error)
        verdict = _result(case, result) if error is None else refusal(error, case.label, case.words)
    if changed and verdict.good:
        return Verdict(case.label, "changed world", changed, verdict.trace)
    return verdict


def _result(case: Case, result: object) -> Verdict:
    if case.check is None:
        return Verdict(case.label, "junk accepted", f"returned {text(result)}")
    try:
        wrong = case.check(result)
    except Exception as error:
        wrong, trace = f"its check failed: {error!r}", traceback.format_exc()
        return Verdict(case.label, "wrong", wrong, trace)
    return Verdict(case.label, "wrong" if wrong else "right", wrong)


def text(value: object) -> str:
    """The first letters of a value, whose own repr may fail."""
    try:
        return str(value)[:120]
    except Exception as error:
        return f"an object whose repr fails: {error}"


def refusal(error: BaseException, label: str = "", words: tuple[str, ...] = ()) -> Verdict:
    """Whether an error names what is wrong, or is torch's own."""
    frames = traceback.extract_tb(error.__traceback__)
    said, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
    last = frames[-1]
    ours = Path(last.filename).is_relative_to(PACKAGE)
    named = isinstance(error, NAMED)
    if ours and named and last.lineno in raises(last.filename):
        missing = [word for word in words if word not in str(error)]
        if missing or len(str(error)) < 15:
            return Verdict(label, "internal error", f"names no {missing}: {said}", trace)
        return Verdict(label, "refused by name", said)
    if isinstance(error, OSError) and error.errno and error.filename:
        return Verdict(label, "refused by name", said)
    if _of_torch(frames):
        return Verdict(label, "torch's own error", said)
    return Verdict(label, "internal error", said, trace)


def _of_torch(frames: traceback.StackSummary) -> bool:
    """Whether it came out of the user's model, or of torch's own constructor and loader."""
    inside = [
        k
        for k, frame in enumerate(frames)
        if frame.filename.endswith("torch/nn/modules/module.py")
        or frame.filename.endswith("torch/optim/optimizer.py")
        or (Path(frame.filename).parent == HERE and k > 2)
    ]
    if not inside:
        return False
    rest = [Path(frame.filename) for frame in frames[inside[-1] :]]
    return all(
        not path.is_relative_to(PACKAGE) or (path.parent.name, path.stem) in TAPES for path in rest
    )


@functools.lru_cache
def raises(filename: str) -> frozenset[int]:
    """The lines of a file that belong to `raise` statements."""
    tree = ast.parse(Path(filename).read_text(encoding="utf-8"))
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(found)


# Worlds ------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> object:
    """A tensor's bytes, for comparison; NaN equals itself."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return "none"
    if tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        return str(tensor)
    with torch.no_grad():
        tensor = tensor.detach().resolve_conj().resolve_neg()
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
        return tensor.shape, tensor.dtype, flat.view(torch.uint8).numpy().tobytes()


@dataclass
class World:
    """What a call has to leave as it was."""

    facts: dict[str, object]

    @classmethod
    def of(cls, model: nn.Module | None) -> World:
        state = random.getstate()
        facts: dict[str, object] = {
            "default dtype": torch.get_default_dtype(),
            "grad mode": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "torch's random state": torch.get_rng_state().numpy().tobytes(),
            "NumPy's random state": np.random.get_state()[1].tobytes(),  # noqa: NPY002
            "Python's random state": state,
        }
        if model is not None:
            facts |= of_model(model)
        return cls(facts)

    def changes(self, now: World) -> str:
        keys = self.facts.keys() | now.facts.keys()
        wrong = [k for k in sorted(keys) if self.facts.get(k) != now.facts.get(k)]
        return f"changed: {', '.join(wrong[:5])}" if wrong else ""


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_always_called",
)


def of_model(model: nn.Module) -> dict[str, object]:
    facts: dict[str, object] = {}
    for name, module in model.named_modules():
        facts[f"training flag of {name!r}"] = module.training
        for hooks in HOOKS:
            facts[f"{hooks} of {name!r}"] = len(getattr(module, hooks, ()))
        if not isinstance(module, torch.jit.ScriptModule):
            facts[f"attributes of {name!r}"] = sorted(vars(module))
    for name, p in model.named_parameters():
        facts[f"parameter {name!r}"] = bits(p), p.requires_grad
        facts[f"gradient of {name!r}"] = None if p.grad is None else bits(p.grad)
    for name, buffer in model.named_buffers():
        facts[f"buffer {name!r}"] = bits(buffer)
    return facts
