"""`compare`: every approximation x layer x damping against the exact block, layer by layer."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab import approximations as registry
from fisherlab import metrics
from fisherlab.approximations import Approximation, Memo
from fisherlab.approximations.exact import Exact
from fisherlab.blocks import Block, BlockError, BlockTooLarge, DirectSum, Outer, contractions
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.direct_sum import layer_block
from fisherlab.blocks.numerics import sum_of
from fisherlab.distributed import RankError, Ranks, unwrapped
from fisherlab.extract import Captures, LayerCapture
from fisherlab.extract.api import Forward, _forward, split_batches
from fisherlab.extract.fisher import FISHER_TYPES, as_module, exact_columns
from fisherlab.extract.joint import shared_out
from fisherlab.extract.memory import captures_in_parts, check_memory, form_bytes, least_bytes
from fisherlab.extract.select import check_batch, check_model
from fisherlab.metrics.alignment import default_rank
from fisherlab.names import nearest

Maker = Approximation | Block | Callable[[LayerCapture], Block] | Mapping[str, Block]
# Share of ||F||^2 that is sampling noise, above which the in-sample error misleads.
NOISY = 0.2
EXACT_UP_TO = 20

IDENTITY = ["layer", "layer_type", "n_parameters", "approximation", "fisher_type", "examples"]
IDENTITY += ["reference_examples", "reference_fisher_type", "seed", "step", "dtype"]
IDENTITY += ["damping", "damping_relative", "placement"]
MEASURES = ["relative_error", "population_error", "population_error_se", "diagonal_share"]
MEASURES += ["optimality_gap", "trace_ratio", "cosine", "scaled_error", "diagonalisation"]
MEASURES += ["subspace_overlap", "direction_cosine", "direction_error", "quadratic_decrease"]
MEASURES += ["quadratic_decrease_scaled", "stein_loss", "condition", "build_seconds"]
MEASURES += ["solve_seconds", "memory_bytes", "clamped"]
COLUMNS = [*IDENTITY, *MEASURES, "note"]


@dataclass
class Comparison:
    """A table of measurements: `frame` has one row per layer x approximation x damping.

    `relative_error = ||X - F|| / ||F||` is in sample; `population_error` against examples the
    approximation has not seen. `config` says what was measured and reruns it; `note` what to mind.
    """

    frame: pd.DataFrame
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        """Whether more than a fifth of `||F||^2` is sampling noise of the batch."""
        return bool(self.frame["diagonal_share"].median() > NOISY)

    @property
    def leading(self) -> str:
        """The error column that deserves to be read first."""
        known = self.frame["population_error"].notna().any()
        return "population_error" if self.noisy and known else "relative_error"

    @property
    def note(self) -> str:
        """What a reader has to know before the first number."""
        if not self.noisy:
            return ""
        share = self.frame["diagonal_share"].median()
        text = (
            f"{share:.0%} of ||F||^2 is the diagonal of the Gram matrix, i.e. sampling noise of "
            "this batch: in-sample errors mostly measure the batch"
        )
        if self.leading == "population_error":
            return text + ", so the table leads with the population error."
        return text + "; pass `reference=` (unseen examples) for the population error."

    def summary(self) -> pd.DataFrame:
        """One row per approximation, the median over layers (and seeds) at the last step.

        Sorted by `leading`; direction cosines get one column per relative damping.
        """
        last = self.frame[self.frame["step"] == self.frame["step"].max()]
        columns = [self.leading]
        columns += [c for c in ("relative_error", "population_error") if c not in columns]
        columns += ["optimality_gap", "trace_ratio", "cosine", "scaled_error", "diagonalisation"]
        columns += ["subspace_overlap", "build_seconds"]
        once = last.drop_duplicates(["layer", "approximation", "seed", "step"])
        table = once.groupby("approximation")[columns].median()
        direction = last.pivot_table(
            index="approximation",
            columns="damping_relative",
            values="direction_cosine",
            aggfunc="median",
        )
        direction.columns = [f"direction_cosine @ {d:g}" for d in direction.columns]
        table = table.join(direction).dropna(axis=1, how="all")
        return table.sort_values(self.leading)

    def save(self, folder: str | Path) -> Path:
        """Write `comparison.csv`, `comparison.parquet` and `config.json` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.frame.to_csv(folder / "comparison.csv", index=False)
        self.frame.to_parquet(folder / "comparison.parquet", index=False)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2, default=str))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read what `save` wrote."""
        folder = Path(folder)
        frame = pd.read_parquet(folder / "comparison.parquet")
        return cls(frame, json.loads((folder / "config.json").read_text()))

    @classmethod
    def concat(cls, tables: Sequence[Comparison]) -> Comparison:
        """Several comparisons (steps of a training run, seeds) as one."""
        frame = pd.concat([table.frame for table in tables], ignore_index=True)
        return cls(frame, tables[-1].config if tables else {})

    def plot(self, kind: str = "error", **options: Any) -> Any:
        """A figure by name: any function of `fl.plots` that takes a comparison."""
        # resolved when called: a table does not depend on its pictures
        import importlib

        plots = importlib.import_module("fisherlab.plots")
        if kind not in plots.__all__:
            near = nearest(kind, plots.__all__, plots.__all__)
            raise ValueError(f"no picture named {kind!r}; nearest: {near}")
        return getattr(plots, kind)(self, **options)

    def _repr_html_(self) -> str:
        styled = self.summary().style.format(precision=4, na_rep="-")
        styled = styled.background_gradient(subset=[self.leading], cmap="Blues_r")
        note = f"<p>{self.note}</p>" if self.note else ""
        return f"{note}{styled.to_html()}"

    def __repr__(self) -> str:
        return f"{self.note}\n{self.summary().to_string(float_format=lambda v: f'{v:.4f}')}".strip()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison; `comparison` holds the layers that were measured before it."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__("interrupted; `.comparison` holds the layers measured so far")
        self.comparison = comparison


def compare(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: object,
    y: Tensor | None = None,
    *,
    approximations: Mapping[str, Maker] | Iterable[str | Approximation] | None = None,
    fisher_type: str | None = None,
    dampings: Sequence[float] = (1e-3, 1e-1),
    reference: object = None,
    generator: torch.Generator | None = None,
    memory: int | None = None,
    layers: Iterable[str] | None = None,
    backend: str = "auto",
    mc_samples: int = 1,
    step: int = 0,
    progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
    forward: Forward | None = None,
    alone: bool = False,
) -> Comparison:
    """How well each approximation matches the exact Fisher block of every layer.

    `x, y` is one batch, or `x` a loader of batches (y None), which count as one sample; a batch may
    be a dict with its labels inside, and `forward(model, x)` calls the model in its own way.
    `approximations`: names or instances, or a dict name -> approximation, block or
    callable(layer) -> block; a dict layer -> block, as `opt.blocks()` hands out, is one
    preconditioner. Default: everything registered that one capture can build.
    `fisher_type`: default exact up to 20 outputs, else mc (empirical for a criterion without a
    known distribution). `dampings` are relative to `tr F / N` of each layer.
    `reference`: unseen examples `(x, y)` or a loader for the population error, or the name of a
    Fisher type to measure against on the same batch. `memory` bounds, in bytes, the chunks that
    approximations are built of and the intermediates of a product (the exact block keeps its `a`
    and `g`); on a device that runs out of memory both are halved until they fit.

    Under `torchrun` every rank calls it with its own shard, of any size (`alone`: this process by
    itself). The layers are shared out: a rank receives the other shards of its layers, their raw
    inputs and output gradients, and every rank returns the table of the joint batch.

    Raises `CaptureError`, `BlockError` or `ValueError` before anything is computed for bad input;
    one that must refuse a layer is a row of NaN with the reason in `note`. Ctrl-C raises
    `Interrupted` with what was measured.
    """
    ranks = None if alone else Ranks.current()
    model = unwrapped(model)
    with ranks.together("checking its batch") if ranks else nullcontext():
        batches = split_batches(x, y)
        check_model(model)
        for batch in batches:
            check_batch(*batch, model)
    if ranks:
        ranks.check_model(model)
        _check_counts(ranks, batches)
    if not dampings or any(not math.isfinite(d) or d <= 0 for d in dampings):
        raise ValueError(f"dampings are relative to tr F / N and positive, got {dampings!r}")
    makers = _makers(approximations, model)
    fisher_type = fisher_type or default_fisher_type(model, criterion, batches[0][0], forward)
    if isinstance(reference, str) and reference not in FISHER_TYPES:
        raise ValueError(f"reference {reference!r} is none of {', '.join(FISHER_TYPES)}")
    if reference is not None and (
        isinstance(reference, Tensor) or not isinstance(reference, Iterable)
    ):
        kind = type(reference).__name__
        raise ValueError(f"reference is (x, y), a loader or a Fisher type, got {kind}")
    options: dict[str, Any] = {"backend": backend, "layers": layers, "mc_samples": mc_samples}
    options |= {"generator": generator, "forward": forward, "ranks": ranks}

    def captured(sample: list[tuple[object, Tensor]], kind: str) -> list[Captures]:
        parts = [
            captures_in_parts(model, criterion, *b, fisher_type=kind, **options) for b in sample
        ]
        return [part for batch in parts for part in batch]

    captures = captured(batches, fisher_type)
    target, unseen = captures, None
    if isinstance(reference, str):
        target = captured(batches, reference)
    elif isinstance(reference, Captures):
        unseen = [copy(reference)]  # ranks give parts of theirs away
    elif reference is not None:
        pair = reference if isinstance(reference, tuple) else (reference, None)
        unseen = captured(split_batches(*pair), fisher_type)
    _check_blocks(makers, captures[0])
    check_memory(captures[0], memory)
    facts = {
        "fisher_type": fisher_type,
        "reference_fisher_type": reference if isinstance(reference, str) else fisher_type,
        "seed": generator.initial_seed() if generator else 0,
        "step": step,
    }
    rows: list[dict[str, Any]] = []
    names = list(_by_layer(captures[0]))
    config = {
        **facts,
        "dampings": list(dampings),
        "approximations": {k: repr(v) for k, v in makers.items()},
    }
    config |= {"backend": captures[0].report.backend, "skipped": captures[0].report.skipped}
    config |= {
        "model": type(model).__name__,
        "criterion": repr(criterion),
        "mc_samples": mc_samples,
    }
    config |= versions() | {"ranks": ranks.size if ranks else 1}
    mine = names
    if ranks:
        owners = ranks.owners(_costs(captures[0]))
        mine = [name for name in names if owners[name] == ranks.index]
        same = target is captures
        captures = [shared_out(batch, ranks, owners) for batch in captures]
        target = captures if same else [shared_out(batch, ranks, owners) for batch in target]
        unseen = unseen and [shared_out(batch, ranks, owners) for batch in unseen]
    try:
        with (
            contractions.workspace(memory),
            ranks.together("measuring its layers") if ranks else nullcontext(),
        ):
            for name in (progress or notebook_bar)(mine):
                measured = _Layer(name, captures, target, unseen, memory)
                rows += measured.rows(makers, dampings, facts)
    except KeyboardInterrupt:
        raise Interrupted(Comparison(pd.DataFrame(rows, columns=COLUMNS), config)) from None
    if ranks:
        rows = [row for part in ranks.objects(rows) for row in part]
        rows.sort(key=lambda row: names.index(row["layer"]))
    return Comparison(pd.DataFrame(rows, columns=COLUMNS), config)


def notebook_bar(names: Sequence[str]) -> Iterable[str]:
    """A progress bar over the layers, in a notebook and from the third second on; else nothing."""
    shell = sys.modules.get("IPython")
    if shell is None or getattr(shell.get_ipython(), "kernel", None) is None:
        return names
    from tqdm.auto import tqdm

    return tqdm(names, desc="layers", delay=3.0, leave=False)


def default_fisher_type(
    model: nn.Module, criterion: Callable, x: object, forward: Forward | None = None
) -> str:
    """exact up to 20 output elements per example, else mc; empirical for an unknown criterion."""
    criterion = as_module(criterion)
    if not isinstance(criterion, nn.CrossEntropyLoss | nn.MSELoss | nn.BCEWithLogitsLoss):
        return "empirical"
    with torch.no_grad():
        outputs = _forward(model, x, forward)
    return "exact" if exact_columns(outputs) <= EXACT_UP_TO else "mc"


def versions() -> dict[str, str]:
    """The versions a measurement depends on."""
    import fisherlab

    return {
        "fisherlab": fisherlab.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _check_counts(ranks: Ranks, batches: list[tuple[object, Tensor]]) -> None:
    """Batch k of the joint sample is batch k of every rank."""
    counts = ranks.objects(len(batches))
    if len(set(counts)) > 1:
        raise RankError(
            f"the ranks' loaders have {counts} batches; give each rank the same number (batches "
            "may differ in size)"
        )


def _costs(captures: Captures) -> dict[str, float]:
    """What measuring each layer takes, roughly, and alike on every rank whatever its shard."""
    costs: dict[str, float] = {}
    for layer in captures.values():
        o, i = layer.shape
        cost = (layer.columns_per_example * layer.positions + o + i) * o * i
        costs[layer.name] = costs.get(layer.name, 0.0) + cost
    return costs


def _makers(
    approximations: Mapping[str, Maker] | Iterable[str | Approximation] | None, model: nn.Module
) -> dict[str, Maker]:
    if approximations is None:
        return {name: registry.get(name)() for name in registry.of_one_batch()}
    if isinstance(approximations, Mapping):
        blocks = {k: v for k, v in approximations.items() if isinstance(v, Block)}
        layers = {name for name, _ in model.named_modules()}
        if len(blocks) == len(approximations) and any(k.split(":")[0] in layers for k in blocks):
            return {"preconditioner": blocks}
        return dict(approximations)
    if isinstance(approximations, str):
        approximations = [approximations]
    makers: dict[str, Maker] = {}
    for item in approximations:
        maker = registry.get(item)() if isinstance(item, str) else item
        if not isinstance(maker, Approximation):
            raise ValueError(f"{item!r} is neither a name nor an approximation; name it in a dict")
        name = maker.name or type(maker).__name__
        makers[name if name not in makers else repr(maker)] = maker
    return makers


def _check_blocks(makers: dict[str, Maker], captures: Captures) -> None:
    """A dict of blocks must name layers of this model; a block must fit one of them."""
    layers = _by_layer(captures)
    known = set(captures) | set(layers)
    for name, maker in makers.items():
        if isinstance(maker, Mapping) and not set(maker) & known:
            raise ValueError(
                f"the blocks of {name!r} are named {sorted(maker)}, the layers {sorted(known)}"
            )
        if isinstance(maker, Block) and maker.shape not in {c.shape for c in captures.values()}:
            raise BlockError(f"block {name!r} of shape {maker.shape} fits no layer of this model")


def _by_layer(captures: Captures) -> dict[str, list[str]]:
    """Layer names and the captures (groups) that each consists of."""
    found: dict[str, list[str]] = {}
    for key, layer in captures.items():
        found.setdefault(layer.name, []).append(key)
    return found


@contextmanager
def _remembering(method: str, *blocks: Block) -> Iterator[None]:
    """Let blocks' `power` or `inner` remember its results: several measures ask for the same."""
    free = {id(block): block for block in blocks if method not in vars(block)}.values()
    for block in free:
        vars(block)[method] = cache(getattr(block, method))
    try:
        yield
    finally:
        for block in free:
            del vars(block)[method]


class _Frame:
    """The exact block, its gradient and its natural-gradient steps."""

    def __init__(self, F: Outer | DirectSum, gradient: Tensor) -> None:
        self.F, self.gradient = F, gradient.to(F.dtype)
        self._steps: dict[float, Tensor] = {}
        self._inside: _Inside | None = None

    def inside(self) -> _Inside | None:
        """The same in a space that holds every input, where that has clearly fewer dimensions."""
        V = self.F.of.input_space if isinstance(self.F, Outer) else None
        F = None if V is None else self.F.within(V)
        if not isinstance(F, Outer) or V is None:
            return None
        self._inside = _Inside(F, self.gradient @ V, V)
        # what is the same in both; an inverse, which cancels, needs the Gram matrix of its own
        Columns.energies.remember(self.F.of, F.energies())
        Columns.gram_eigen.remember(self.F.of, F.of.gram_eigen)
        Outer._squared_norm.remember(self.F, F.squared_norm())
        return self._inside

    def step(self, damping: float) -> Tensor:
        """`-(F + damping I)^{-1} g`, which every approximation is compared with."""
        if damping not in self._steps:
            if self._inside is None:
                self._steps[damping] = -self.F.solve(self.gradient, damping)
            else:
                self._steps[damping] = self._inside.step(damping) @ self._inside.V.mT
        return self._steps[damping]


class _Inside(_Frame):
    """A frame in coordinates of the inputs, along the orthonormal columns of `V` `[i, r]`."""

    def __init__(self, F: Outer, gradient: Tensor, V: Tensor) -> None:
        super().__init__(F, gradient)
        self.V = V


class _Layer:
    """One layer under measurement: its exact block, and a memo per group that all methods share."""

    def __init__(
        self,
        name: str,
        captures: list[Captures],
        target: list[Captures],
        unseen: list[Captures] | None,
        memory: int | None,
    ) -> None:
        self.name = name
        self.keys = _by_layer(captures[0])[name]
        self.parts = [[batch[key] for batch in captures] for key in self.keys]
        self.first = self.parts[0][0]
        self.memos = [Memo(part, memory) for part in self.parts]
        same = target is captures
        shared = [m.exact() for m in self.memos] if same else []
        self.F = layer_block(shared) if same else self._exact(target)
        self.unseen = self._exact(unseen) if unseen else None
        # of the mean loss; a layer in groups has one below the other
        sums = [sum_of(c.gradient * c.examples for c in memo.layers) for memo in self.memos]
        self.whole = _Frame(self.F, torch.cat(sums) / self.memos[0].count)
        # every weight that matters is a combination of inputs: of few, in their coordinates
        self.inside = self.whole.inside() if same and self.unseen is None else None
        self.examples = int(self.memos[0].count)
        self.reference_examples = (
            sum(batch.labels.shape[0] for batch in unseen) if unseen else self.examples
        )

    def _exact(self, captures: list[Captures]) -> Outer | DirectSum:
        return layer_block([Exact()(*(batch[key] for batch in captures)) for key in self.keys])

    def build(self, maker: Maker) -> Block | None:
        """The block of one method on this layer; None where a given block is of another layer."""
        if isinstance(maker, Approximation):
            return layer_block([memo.block(maker) for memo in self.memos])
        if isinstance(maker, Block):
            return maker if maker.shape == self.F.shape else None
        if isinstance(maker, Mapping):
            parts = [maker[key] for key in self.keys if key in maker]
            return maker.get(self.name) or (layer_block(parts) if parts else None)
        return layer_block([maker(part[0]) for part in self.parts])

    def rows(
        self, makers: dict[str, Maker], dampings: Sequence[float], facts: dict[str, Any]
    ) -> list[dict[str, Any]]:
        base = {
            "layer": self.name,
            "layer_type": self.first.layer_type,
            "n_parameters": self.F.size,
            "examples": self.examples,
            "reference_examples": self.reference_examples,
            "dtype": str(self.F.dtype).removeprefix("torch."),
            "diagonal_share": metrics.diagonal_share(
                self.unseen or (self.inside or self.whole).F
            ).item(),
            **facts,
        }
        rows = []
        exact = [frame.F for frame in (self.whole, self.inside) if frame is not None]
        with _remembering("power", *exact):
            for name, maker in makers.items():
                with _remembering("inner", *exact):
                    measured = list(self._measure(maker, dampings))
                rows += [{**base, "approximation": name, **row} for row in measured]
        best = [r["relative_error"] for r in rows if r["approximation"] == "kronecker_optimal"]
        for row in rows:
            row["optimality_gap"] = row["relative_error"] - best[0] if best else math.nan
        return rows

    def _measure(self, maker: Maker, dampings: Sequence[float]) -> Iterator[dict[str, Any]]:
        empty = dict.fromkeys(MEASURES, math.nan)
        del empty["diagonal_share"], empty["optimality_gap"]
        unit = self.F.trace().item() / self.F.size
        start = time.perf_counter()
        try:
            X = self._retried(self.build, maker)
            if X is None:
                return
            if X.shape != self.F.shape:
                raise BlockError(f"a block of shape {X.shape} on a weight of {self.F.shape}")
            built = {"build_seconds": time.perf_counter() - start, "memory_bytes": X.memory_bytes()}
            near, frame = self._retried(self._nearest, X)
            static, reason = self._retried(self._static, near, frame.F)
            common = {**empty, **built, **static}
        except BlockError as error:
            for share in dampings:
                damping = {"damping": share * unit, "damping_relative": share}
                yield {**empty, **damping, "placement": "", "note": str(error)}
            return
        for share in dampings:
            row = {**common, "damping": share * unit, "damping_relative": share, "note": reason}
            try:
                with _remembering("power", X, near):
                    row |= self._retried(self._damped, maker, X, near, frame, share * unit)
            except BlockError as error:
                row |= {"placement": "", "note": str(error)}
            yield row

    def _retried(self, act: Callable[..., Any], *args: Any) -> Any:
        """`act(*args)`, again in half the memory each time the device runs out of it."""
        while True:
            try:
                return act(*args)
            except torch.OutOfMemoryError as error:
                message = str(error)
            # out of the handler, whose traceback holds on to the tensors that did not fit
            self._halve(message)

    def _halve(self, message: str) -> None:
        """Half the bytes of a chunk and of an intermediate; refused where that is not possible."""
        if self.F.device.type == "cuda":
            torch.cuda.empty_cache()
        halved = contractions.halve_workspace()
        for memo in self.memos:
            size = max(form_bytes(layer) for layer in memo.layers)
            half = min(size, memo.memory or size) // 2
            if half >= max(least_bytes(layer) for layer in memo.layers):
                memo.memory, halved = half, True
        if not halved:
            raise BlockTooLarge(
                f"layer {self.name!r} runs out of memory even in chunks of one example; its exact "
                f"block alone holds {self.F.memory_bytes():,} bytes: take a smaller batch or "
                f"another device ({message})"
            )

    def _nearest(self, X: Block) -> tuple[Block, _Frame]:
        """A block in the coordinates of the inputs if it is known to be zero beside them."""
        if self.inside is None:
            return X, self.whole
        near = self.inside.F if X is self.F else X.within(self.inside.V)
        return (X, self.whole) if near is None else (near, self.inside)

    def _static(self, X: Block, F: Block) -> tuple[dict[str, float], str]:
        """What does not depend on the damping, and why a measure of the spectrum is missing."""
        error, spread = math.nan, math.nan
        if self.unseen is not None:
            error, spread = (v.item() for v in metrics.population_error(X, self.unseen))
        spectral = {"diagonalisation": math.nan, "subspace_overlap": math.nan}
        reason = ""
        try:
            spectral["diagonalisation"] = metrics.diagonalisation(X, F).item()
            spectral["subspace_overlap"] = metrics.subspace_overlap(X, F, default_rank(F)).item()
        except BlockError as refusal:
            reason = str(refusal)
        # after the diagonalisation, whose rotated gradients the inner product uses
        return {
            **spectral,
            "relative_error": metrics.relative_error(X, F).item(),
            "population_error": error,
            "population_error_se": spread,
            "trace_ratio": metrics.trace_ratio(X, F).item(),
            "cosine": metrics.cosine(X, F).item(),
            "scaled_error": metrics.scaled_error(X, F).item(),
        }, reason

    def _damped(
        self, maker: Maker, X: Block, near: Block, frame: _Frame, damping: float
    ) -> dict[str, Any]:
        if damping == 0:
            raise BlockError("the exact block is zero, so a damping relative to its trace is zero")
        start = time.perf_counter()
        P, placement = self._preconditioner(maker, X, damping)
        plain = P is None or P is X.power(-1, damping)
        # placed elsewhere, the damping may depend on the dimensions that the inputs miss
        at, block = (frame, near) if plain else (self.whole, X)
        P = block.power(-1, damping) if P is None or plain else P
        ours = -(P @ at.gradient)
        seconds = time.perf_counter() - start
        step = metrics.step(block, at.F, at.gradient, damping, exact=at.step(damping), ours=ours)
        return {
            "placement": placement,
            "direction_cosine": step.cosine.item(),
            "direction_error": step.error.item(),
            "quadratic_decrease": step.decrease.item(),
            "quadratic_decrease_scaled": step.decrease_scaled.item(),
            "stein_loss": metrics.stein_loss(near, frame.F, damping).item(),
            "condition": metrics.condition(near, frame.F, damping, frame is self.inside).item(),
            "solve_seconds": seconds,
            "clamped": X.clamped,
        }

    def _preconditioner(self, maker: Maker, X: Block, damping: float) -> tuple[Block | None, str]:
        """The damped inverse as its method places the damping; None is `(X + damping I)^{-1}`."""
        if not isinstance(maker, Approximation) or maker.exponent != -1:
            return None, "tikhonov"
        if isinstance(X, DirectSum):
            return DirectSum([maker.damped(part, damping) for part in X.parts]), maker.placement
        return maker.damped(X, damping), maker.placement
