"""The request for a comparison, checked before anything is computed."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fisherlab
from fisherlab import approximations as registry
from fisherlab import doors
from fisherlab.approximations import Approximation
from fisherlab.blocks import Block, BlockError, Dense
from fisherlab.comparison.display import described
from fisherlab.comparison.measurement import Candidate
from fisherlab.comparison.samples import Samples, by_layer
from fisherlab.distributed import RankError, Ranks, answering, in_words, jointly, unwrapped
from fisherlab.extract import CaptureError, Captures
from fisherlab.extract.api import Forward, _forward, check_forward, check_generator, split_batches
from fisherlab.extract.criteria import arranged, as_module, rules_of
from fisherlab.extract.fisher import FISHER_TYPES, default_type
from fisherlab.extract.geometry import NoBlock
from fisherlab.extract.hessian import mean_hessians
from fisherlab.extract.inside import Inside, criterion_of
from fisherlab.extract.isolation import isolated
from fisherlab.extract.memory import captures_in_parts, check_memory
from fisherlab.extract.select import Names, check_batch, check_model
from fisherlab.extract.tape import KINDS

# references by name that are no Fisher type, and the type that has the same block
FISHER_OF = {"ggn": "exact"}
REFERENCES = (*FISHER_TYPES, *FISHER_OF, "hessian")

DIFFERENT = "were asked for different comparisons"

Candidates = Mapping[str, Candidate] | Iterable[str | Approximation] | None
Batch = tuple[object, Tensor]


@dataclass(frozen=True)
class Request:
    """The batches, the methods, and how to capture: all of it checked."""

    model: nn.Module
    criterion: Callable[..., Tensor]
    batches: list[Batch]
    makers: dict[str, Candidate]
    dampings: list[float]
    # examples are batches, read once
    reference: str | Captures | list[Batch] | None
    fisher_type: str
    # whether it was named, and why the default is the empirical one
    asked: bool
    why_empirical: str
    memory: int | None
    step: int
    ranks: Ranks | None
    # options of `capture`
    options: dict[str, Any]

    @property
    def inside(self) -> bool:
        """Whether the model makes its loss itself."""
        return isinstance(self.criterion, Inside)

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that every row repeats."""
        generator = self.options["generator"]
        named = isinstance(self.reference, str)
        return {
            "fisher_type": self.fisher_type,
            "reference_fisher_type": self.reference if named else self.fisher_type,
            "seed": generator.initial_seed(),
            "step": self.step,
        }

    def samples(self) -> Samples:
        """The captures of the batches, and those that they are measured against.

        Raises:
            CaptureError, BlockError, ValueError: a layer cannot be captured, given blocks are of
                another model, or the budget holds no example.
        """
        captures = self._captured(self.batches, self.fisher_type)
        _left_out(captures, captures)
        target: list[Captures] | None = None
        held_out: list[Captures] | None = None
        hessians: dict[str, Dense] | None = None
        if self.reference == "hessian":
            hessians = self._hessians(captures[0])
        elif isinstance(self.reference, str):
            kind = FISHER_OF.get(self.reference, self.reference)
            if kind != self.fisher_type:
                target = self._captured(self.batches, kind)
                _left_out(captures, target)
        elif isinstance(self.reference, Captures):
            _check_layers(captures[0], self.reference)
            held_out = [copy(self.reference)]  # ranks give parts of theirs away
        elif self.reference is not None:
            if self.ranks is not None:
                _check_counts(self.ranks, self.reference)
            try:
                held_out = self._captured(self.reference, self.fisher_type)
            except NoBlock:
                raise
            except CaptureError as error:
                raise CaptureError(f"the examples of reference: {error}") from error
            _left_out(captures, held_out)
        _check_blocks(self.makers, captures[0])
        check_memory(captures[0], self.memory)
        return Samples(captures, target, held_out, hessians)

    def _hessians(self, captures: Captures) -> dict[str, Dense]:
        groups = by_layer(captures)
        parts = {name: [captures[key].shape for key in keys] for name, keys in groups.items()}
        layers, skip, forward = (self.options[key] for key in ("layers", "skip", "forward"))
        wanted = {name: (sum(o for o, _ in shapes), shapes[0][1]) for name, shapes in parts.items()}
        return mean_hessians(
            self.model, self.criterion, self.batches, layers, skip, forward, wanted
        )

    def _captured(self, sample: list[Batch], kind: str) -> list[Captures]:
        found = [
            part
            for x, y in sample
            for part in captures_in_parts(
                self.model,
                self.criterion,
                x,
                None if self.inside else y,
                fisher_type=kind,
                ranks=self.ranks,
                **self.options,
            )
        ]
        if self.inside and len(found) > 1 and not found[0].outputs.ndim:
            raise ValueError(
                "the losses of several batches have no common mean as numbers; let the model "
                "return the loss of every example"
            )
        return found

    def config(self, captures: list[Captures]) -> dict[str, Any]:
        """The facts that the table's file keeps besides its rows."""
        report = captures[0].report
        return {
            **self.facts,
            "dampings": self.dampings,
            "approximations": {name: repr(maker) for name, maker in self.makers.items()},
            "backend": report.backend,
            "fisher_type_asked": self.asked,
            "skipped": dict(report.skipped),
            "parameters": {"trained": report.trained, "covered": report.covered},
            "model": type(self.model).__name__,
            "layers": {layer.name: described(layer) for layer in captures[0].values()},
            "criterion": repr(self.criterion),
            "why_empirical": self.why_empirical,
            "mc_samples": self.options["mc_samples"],
            **versions(),
            "ranks": self.ranks.size if self.ranks else 1,
        }


def checked(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor] | None,
    x: object,
    y: Tensor | None,
    *,
    approximations: Candidates,
    fisher_type: str | None,
    dampings: Sequence[float] | float,
    reference: object,
    memory: int | None,
    layers: Names,
    forward: Forward | None,
    step: int,
    alone: bool,
    loss_scale: str | None,
    layers_at_once: int | None,
    **options: Any,
) -> Request:
    """The request of `compare`'s arguments; `options` are those of `capture`.

    Raises:
        CaptureError, RankError, ValueError: an argument that no comparison can take, by name.
    """
    doors.flag(alone, "alone")
    doors.count(step, "step", 0)
    check_forward(forward)
    if fisher_type is not None:
        doors.choice(fisher_type, "fisher_type", FISHER_TYPES, error=CaptureError)
    ranks = None if alone else Ranks.current()
    model = unwrapped(model)
    if ranks:
        ranks.meet()
        words = {
            "approximations": approximations,
            "fisher_type": fisher_type,
            "dampings": dampings,
            "reference": reference if isinstance(reference, str | None) else "of examples",
            "layers": layers,
            "layers_at_once": layers_at_once,
            "forward": forward,
            "step": step,
            "loss_scale": loss_scale,
            "criterion": criterion,
            **options,
            "mask": "of this batch" if isinstance(options["mask"], Tensor) else options["mask"],
        }
        ranks.check_same(
            {name: in_words(value) for name, value in words.items()},
            DIFFERENT,
            "pass all of them the same",
        )
    doing = "checking its batch"
    with answering(ranks, doing), jointly(ranks, doing):
        criterion = criterion_of(criterion, loss_scale)
        batches = split_batches(x, y, isinstance(criterion, Inside))
        check_model(model)
        check_generator(options["generator"])
        for batch in batches:
            check_batch(*batch, model)
        shares = _shares(dampings)
        if memory is not None:
            memory = doors.count(memory, "memory is a number of bytes, such as 800_000_000, which")
        makers = named_makers(approximations, model)
        if not makers:
            raise ValueError(f"no approximation to compare; known: {', '.join(registry.names())}")
        asked, why_empirical = fisher_type is not None, ""
        if fisher_type is None:
            fisher_type, why_empirical = _default_type(model, criterion, *batches[0], forward)
        compared = _checked_reference(
            reference, batches, options["mask"], isinstance(criterion, Inside), model, fisher_type
        )
        masked = options["mask"] is not None
        if reference == "hessian" and (ranks or isinstance(criterion, Inside) or masked):
            raise ValueError(
                "reference='hessian' is that of a criterion outside the model, without a mask, in "
                "one process; measure against another reference, or pass the criterion"
            )
    if ranks:
        ranks.check_model(model)
        _check_counts(ranks, batches)
        ranks.check_same({"fisher_type": fisher_type}, DIFFERENT, "name it")
    # the approximations are of linear maps; others are compared where they are named
    options |= {"kinds": ("map",) if layers is None else KINDS}
    if options["generator"] is None:  # one for all batches: none repeats another's draws
        options["generator"] = torch.Generator().manual_seed(0)
    return Request(
        model=model,
        criterion=criterion,
        batches=batches,
        makers=makers,
        dampings=shares,
        reference=compared,
        fisher_type=fisher_type,
        asked=asked,
        why_empirical=why_empirical,
        memory=memory,
        step=step,
        ranks=ranks,
        options={**options, "layers": layers, "forward": forward},
    )


def _shares(dampings: object) -> list[float]:
    """The dampings as a list of positive numbers."""
    alone = doors.real(dampings) is not None
    listed = isinstance(dampings, Iterable) and not isinstance(dampings, str | bytes | Mapping)
    shares: list[Any] = [dampings] if alone or not listed else doors.items(dampings, "dampings")
    if not shares or any((d := doors.real(s)) is None or not 0 < d < math.inf for s in shares):
        raise ValueError(
            f"dampings are relative to tr F / N and positive, got {doors.said(dampings)}"
        )
    return [float(share) for share in shares]


def default_fisher_type(
    model: nn.Module,
    criterion: Callable[..., Any],
    x: object,
    forward: Forward | None = None,
    y: Tensor | None = None,
) -> str:
    """exact up to 20 output elements per example, else mc; empirical for an unknown criterion.

    NLLLoss is cross entropy if the outputs are log-probabilities, else unknown.

    Args:
        model: the model; it comes back untouched.
        criterion: the loss.
        x: one batch, as in `compare`.
        forward: `forward(model, x)` makes the outputs; None: `model(x)`.
        y: the labels, which tell whether classes are axis 1 of the outputs or the last.

    Returns:
        "exact", "mc" or "empirical".
    """
    return _default_type(model, criterion, x, y, forward)[0]


def _default_type(
    model: nn.Module,
    criterion: Callable[..., Any],
    x: object,
    y: Tensor | None,
    forward: Forward | None,
) -> tuple[str, str]:
    """The default Fisher type, and why it is the empirical one."""
    criterion = as_module(criterion)
    if rules_of(criterion) is None:  # no forward pass is needed to know
        return default_type(criterion, torch.empty(0, device="cpu"))
    with isolated(model, x), torch.no_grad():
        outputs = _forward(model, x, forward)
        return default_type(criterion, outputs if y is None else arranged(criterion, outputs, y))


def versions() -> dict[str, str]:
    """The versions on which a measurement depends.

    Returns:
        A version by name of the library.
    """
    return {
        "fisherlab": fisherlab.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _checked_reference(
    reference: object,
    batches: list[Batch],
    mask: object,
    inside: bool,
    model: nn.Module,
    fisher_type: str,
) -> str | Captures | list[Batch] | None:
    """The reference, examples as batches that are read once.

    Raises:
        CaptureError: its examples are none.
        ValueError: it is no reference of these batches.
    """
    if isinstance(reference, str):
        doors.choice(reference, "reference", REFERENCES)
    if reference is not None and (
        isinstance(reference, Tensor) or not isinstance(reference, Iterable)
    ):
        kind = type(reference).__name__
        raise ValueError(
            f"reference is (x, y), a loader, a Fisher type, 'ggn' or 'hessian', got {kind}"
        )
    if isinstance(mask, Tensor) and (
        len(batches) > 1 or not isinstance(reference, str | Captures | None)
    ):
        raise ValueError(
            "a mask tensor is that of one batch; for a loader or a reference pass dict batches and "
            "the name of their mask, such as mask='attention_mask'"
        )
    if isinstance(reference, Captures):
        kinds = {layer.fisher_type for layer in reference.values()}
        if kinds != {fisher_type}:
            raise ValueError(
                f"reference holds captures of the {', '.join(sorted(kinds))} Fisher, and the table "
                f"is of the {fisher_type} one; capture both alike"
            )
    if reference is None or isinstance(reference, str | Captures):
        return reference
    try:
        pair = reference if isinstance(reference, tuple) else (reference, None)
        others = split_batches(reference, None, True) if inside else split_batches(*pair)
        for batch in others:
            check_batch(*batch, model)
    except (TypeError, ValueError) as error:
        raise CaptureError(f"the examples of reference: {error}") from error
    _check_held_out(batches, others)
    return others


def _left_out(captures: list[Captures], others: Sequence[Captures]) -> None:
    """Leave out layers that have no block in some batch, and say so where the first one does."""
    first = captures[0]
    reasons: dict[str, str] = {}
    gone = 0
    for other in others:
        for key in [key for key in first if key not in other]:
            layer = first.pop(key)
            gone += layer.shape[0] * layer.shape[1]
            why = other.report.skipped.get(layer.name, "it was not captured")
            reasons[layer.name] = f"in another batch, {why}"
    if reasons:
        skipped = first.report.skipped | reasons
        covered = max(0, first.report.covered - gone)
        first.report = replace(first.report, skipped=skipped, covered=covered)
        if not first:
            raise NoBlock(skipped)


def _check_layers(captures: Captures, reference: Captures) -> None:
    """Refuse captures of another model as a reference."""
    for name, layer in captures.items():
        other = reference.get(name)
        if other is None or other.shape != layer.shape:
            found = "no such layer" if other is None else f"one of shape {other.shape}"
            raise ValueError(
                f"layer {name!r} has shape {layer.shape}, and reference has {found}; capture it of "
                "this model"
            )


def _check_counts(ranks: Ranks, batches: list[Batch]) -> None:
    """Batch k of the joint sample is batch k of every rank."""
    counts = ranks.objects(len(batches))
    if len(set(counts)) > 1:
        raise RankError(
            f"the ranks' loaders have {counts} batches; give each rank the same number (batches "
            "may differ in size)"
        )


def named_makers(approximations: Candidates, model: nn.Module) -> dict[str, Candidate]:
    """The approximations of `compare`'s argument, by the names that they have in a table."""
    if approximations is None:
        return {name: registry.get(name)() for name in registry.of_one_batch()}
    if isinstance(approximations, Mapping):
        for name, maker in approximations.items():
            if not isinstance(name, str) or not (
                isinstance(maker, Block | Approximation | Mapping) or callable(maker)
            ):
                raise ValueError(
                    "a dict of approximations has names, and approximations, blocks or functions "
                    f"of a layer; got {doors.said(name)}: {doors.said(maker)}"
                )
        blocks = {k: v for k, v in approximations.items() if isinstance(v, Block)}
        layers = {name for name, _ in model.named_modules()}
        if len(blocks) == len(approximations) and any(k.split(":")[0] in layers for k in blocks):
            return {"preconditioner": blocks}
        return dict(approximations)
    wanted = "approximations are names, instances, or a dict of name -> approximation, which"
    makers: dict[str, Candidate] = {}
    for item in doors.items(approximations, wanted):
        maker = registry.get(item)() if isinstance(item, str) else item
        if not isinstance(maker, Approximation):
            raise ValueError(
                f"{doors.said(item)} among the approximations is neither a name nor an "
                "approximation; name it in a dict"
            )
        name = maker.name or type(maker).__name__
        if maker not in makers.values():
            makers[name if name not in makers else repr(maker)] = maker
    return makers


def _check_held_out(batches: list[Batch], reference: list[Batch]) -> None:
    """Refuse the batch itself as its held-out examples: it would flatter every approximation."""
    for x, _ in batches:
        for other, _ in reference:
            if x is other or (
                isinstance(x, Tensor)
                and isinstance(other, Tensor)
                and doors.is_strided(x)
                and doors.is_strided(other)
                and (x.shape, x.dtype, x.device) == (other.shape, other.dtype, other.device)
                and torch.equal(x, other)
            ):
                raise ValueError(
                    "reference holds the very batch that the approximations are made of, whose "
                    "error is relative_error; pass examples that they have not seen"
                )


def _check_blocks(makers: dict[str, Candidate], captures: Captures) -> None:
    """A dict of blocks must name layers of this model; a block must fit one of them."""
    layers = by_layer(captures)
    known = set(captures) | set(layers)
    for name, maker in makers.items():
        if isinstance(maker, Mapping) and not set(maker) & known:
            raise ValueError(
                f"the blocks of {name!r} are named {sorted(maker)}, the layers {sorted(known)}"
            )
        for layer, block in maker.items() if isinstance(maker, Mapping) else ():
            doors.instance(block, f"{name}[{layer!r}]", Block, "a block of fl.blocks")
        if isinstance(maker, Block) and maker.shape not in {c.shape for c in captures.values()}:
            raise BlockError(f"block {name!r} of shape {maker.shape} fits no layer of this model")
