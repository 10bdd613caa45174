"""The processes of one `torch.distributed` job that hold shards of the same batch.

Everything that travels between processes goes through `Ranks`: gloo on CPU, nccl on GPU (nccl has
not been run). Without a process group, or with a single process, there are no ranks (None) and
nothing here is called.

Ranks send by a group of their own, a `Line`. A rank that fails closes it, so that the others fail
at once. Its last word is in the job's store, from which they name it.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fisherlab

T = TypeVar("T", bound=BaseException)
# Sent ahead of a tensor: its dtype cannot differ between ranks of one model, its shape can.
_MAX_DIMS = 8
# Seconds in which a rank that is alive says so, once another has failed.
ANSWER = 10.0


AGAIN = (
    "start the job anew, whose finished work is taken over, or pass init_process_group a longer "
    "timeout"
)


class RankError(ValueError):
    """Ranks that cannot work together: other models, other shapes, a rank that failed."""


class Line:
    """A group of the same processes as another, by which nothing else of the program sends.

    Args:
        group: the other one.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.members, self.backend = dist.get_process_group_ranks(group), dist.get_backend(group)
        self._name = group.group_name
        # torch's own barrier does not read it; None: torch's default
        options = None
        if "gloo" in self.backend:
            options = getattr(group._get_backend(torch.device("cpu")), "options", None)
        self.timeout: timedelta | None = getattr(options, "_timeout", None)
        self.own: dist.ProcessGroup | None = None
        # how often a rank was lost, the same number on all
        self._losses = 0

    def open(self) -> None:
        """Make the group; every member does."""
        # processes that are no members make no group with these, and torch then has one name for it
        few = len(self.members) < dist.get_world_size()
        if few and self._losses:
            raise RankError(f"the ranks {self.members} lost each other before; {AGAIN}")
        self.own = dist.new_group(
            self.members, self.timeout, self.backend, use_local_synchronization=few
        )

    def close(self, index: int, word: str) -> None:
        """Leave this rank's last word, and close the group: the others fail at once."""
        with suppress(RuntimeError):
            _store().set(self._key(index, self._losses), word)
        self._losses += 1
        own, self.own = self.own, None
        if own is not None:
            with suppress(RuntimeError, ValueError):
                dist.destroy_process_group(own)

    def words(self, indices: list[int]) -> dict[int, str | None]:
        """Each rank's word at the last loss; None if it says none within `ANSWER` seconds."""
        found: dict[int, str | None] = dict.fromkeys(indices)
        end = time.monotonic() + ANSWER
        for index in indices:
            left = timedelta(seconds=max(0.1, end - time.monotonic()))
            key = self._key(index, self._losses - 1)
            with suppress(RuntimeError):
                _store().wait([key], left)
                found[index] = _store().get(key).decode()
        return found

    def _key(self, index: int, loss: int) -> str:
        return f"fisherlab/{self._name}/{loss}/{index}"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


_LINES: WeakKeyDictionary[Any, Line] = WeakKeyDictionary()


def _line(group: Any) -> Line:
    """The one line beside a group."""
    if group not in _LINES:
        _LINES[group] = Line(group)
    return _LINES[group]


class Ranks:
    """The ranks of a process group: sums, concatenations and shares of work among them."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.index, self.size = dist.get_rank(group), dist.get_world_size(group)
        nccl = "nccl" in dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        self._line = _line(dist.group.WORLD if group is None else group)

    @classmethod
    def current(cls) -> Ranks | None:
        """The ranks of the default process group; None where there is none, or one process."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
            return None
        return cls()

    @classmethod
    def of(cls, model: nn.Module) -> Ranks | None:
        """The ranks over which a DDP-wrapped model averages its gradients; None for others."""
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return None
        group = model.process_group
        return cls(group) if dist.get_world_size(group) > 1 else None

    def objects(self, value: Any) -> list[Any]:
        """The objects that the ranks passed, in rank order: for small things."""
        found: list[Any] = [None] * self.size
        with self._sending() as group:
            dist.all_gather_object(found, value, group)
        return found

    def sum(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`sum_r` of every tensor, by one `all_reduce` in the widest of their dtypes."""
        values = list(tensors.values())
        dtype, device = values[0].dtype, self.device or values[0].device
        for value in values:
            dtype = torch.promote_types(dtype, value.dtype)
        flat = torch.cat([v.to(device, dtype).flatten() for v in values])
        with self._sending() as group:
            dist.all_reduce(flat, group=group)
        parts = flat.split([v.numel() for v in values])
        return {
            name: part.view(value.shape).to(value)
            for (name, value), part in zip(tensors.items(), parts, strict=True)
        }

    def total(self, value: float) -> float:
        """`sum_r` of a number."""
        return float(self.sum({"": torch.tensor(value, dtype=torch.float64, device="cpu")})[""])

    def gather(self, tensor: Tensor, dim: int = 0, to: int | None = None) -> Tensor:
        """Every rank's tensor, concatenated along `dim` in rank order; sizes there may differ.

        With `to` only that rank receives it, and the others get their own tensor back.
        """
        sizes = self._sizes(tensor, dim)
        home = tensor.device
        mine = tensor.detach().to(self.device or home).movedim(dim, 0)
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])
        padded[: len(mine)] = mine
        wanted = to is None or to == self.index
        parts = [torch.empty_like(padded) for _ in sizes] if wanted else None
        with self._sending() as group:
            if to is None:
                dist.all_gather(parts, padded, group=group)
            else:
                dist.gather(padded, parts, dst=dist.get_global_rank(group, to), group=group)
        if parts is None:
            return tensor
        joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return joined.movedim(0, dim).to(home)

    def _sizes(self, tensor: Tensor, dim: int) -> list[int]:
        """Each rank's size along `dim`; the other axes must agree."""
        shape = [tensor.ndim, *tensor.shape]
        mine = torch.zeros(_MAX_DIMS + 1, dtype=torch.long, device=self.device or tensor.device)
        mine[: len(shape)] = torch.tensor(shape, device="cpu")
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with self._sending() as group:
            dist.all_gather(every, mine, group=group)
        shapes = [tuple(one[1 : 1 + int(one[0])].tolist()) for one in every]
        rest = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
        if len(rest) > 1:
            raise RankError(
                f"the ranks hold tensors of shapes {shapes}, which differ beyond axis {dim}; pad "
                "the examples of all ranks to the same size"
            )
        return [shape[dim] for shape in shapes]

    def shard(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a batch that every rank holds, in order and nearly equal."""
        return tensor.tensor_split(self.size)[self.index]

    def own_examples(self, count: int) -> slice:
        """Where this rank's `count` rows lie among those of all ranks."""
        counts = self.objects(count)
        start = sum(counts[: self.index])
        return slice(start, start + count)

    def broadcast(self, tree: Any, source: int) -> Any:
        """The `source`'s nest of dicts, lists and tensors, on every rank."""
        tensors: list[Tensor] = []
        outline = [_outline(tree, tensors) if self.index == source else None]
        with self._sending() as group:
            first = dist.get_global_rank(group, source)
            dist.broadcast_object_list(outline, first, group)
        received = iter(tensors)

        def fill(part: Any) -> Any:
            if isinstance(part, dict):
                return {key: fill(value) for key, value in part.items()}
            if isinstance(part, list):
                return [fill(value) for value in part]
            if not isinstance(part, _Tensor):
                return part
            if self.index == source:
                # laid out as the others have it, with which products round alike
                value = next(received).contiguous()
            else:
                device = self.device or torch.device("cpu")
                value = torch.empty(part.shape, dtype=part.dtype, device=device)
            with self._sending() as group:
                dist.broadcast(value.to(self.device or value.device), first, group=group)
            return value

        return fill(outline[0])

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """A rank for each job; greedy: the most expensive job first, to the least loaded rank."""
        load = [0.0] * self.size
        found: dict[str, int] = {}
        for name, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
            found[name] = load.index(min(load))
            load[found[name]] += cost
        return found

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Work without collectives: where it fails on one rank it fails on all, by its name."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self.objects(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise _known(failure)
        for rank, message in enumerate(messages):
            if message:
                raise RankError(f"rank {rank} failed while {doing}: {message}")

    @contextmanager
    def answering(self, doing: str) -> Iterator[None]:
        """Work with collectives: where it fails on one rank, the others name it at their next one.

        A `RankError`, and what `together` raised, are known to all.
        """
        try:
            yield
        except BaseException as error:
            if not _is_known(error):
                self._line.close(self.index, f"{doing}: {type(error).__name__}: {error}")
            _known(error)
            raise

    @contextmanager
    def _sending(self) -> Iterator[dist.ProcessGroup]:
        """The group to send by; `RankError` with the names of lost ranks where that fails."""
        try:
            if self._line.own is None:
                self._barrier(self.group)
                self._line.open()
            assert self._line.own is not None
            yield self._line.own
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RankError:
        """The ranks that failed or do not answer, after a collective that did not end."""
        self._line.close(self.index, "")
        words = self._line.words([rank for rank in range(self.size) if rank != self.index])
        for rank, word in words.items():
            if word:
                return RankError(f"rank {rank} failed while {word}")
        silent = [str(rank) for rank, word in words.items() if word is None]
        who = f"rank {' and '.join(silent)}" if silent else "a rank"
        return RankError(
            f"{who} died, is late, or does something else, as rank {self.index} waited: "
            f"{_first_line(error)}; {AGAIN}"
        )

    def meet(self) -> None:
        """Wait for every rank, and refuse ranks of other versions.

        The wait is the group's own timeout, which the user gave `init_process_group`.

        Raises:
            RankError: some did not come, or run another version; the message names them.
        """
        if self._line.own is not None:
            with self._sending() as group:
                self._barrier(group)
        self.check_same(
            {"fisherlab": fisherlab.__version__, "torch": str(torch.__version__)},
            "run different versions",
            "install one on every machine",
        )

    def _barrier(self, group: dist.ProcessGroup | None) -> None:
        if "gloo" in self._line.backend:  # nccl cannot say who is missing
            dist.monitored_barrier(group, self._line.timeout, wait_all_ranks=True)

    def check_same(self, described: Mapping[str, str], doing: str, advice: str) -> None:
        """Refuse ranks of which one has another value of something, by its name.

        Args:
            described: what must be the same, in words.
            doing: what they do in different ways: "run different versions".
            advice: what to do about it.
        """
        every = self.objects(dict(described))
        for rank, other in enumerate(every):
            for name in [*every[0], *(n for n in other if n not in every[0])]:
                first, theirs = every[0].get(name, "absent"), other.get(name, "absent")
                if theirs != first:
                    raise RankError(
                        f"the ranks {doing}: {name} {first} on rank 0 and {theirs} on rank "
                        f"{rank}; {advice}"
                    )

    def check_model(self, model: nn.Module, buffers: bool = True) -> None:
        """Refuse models that differ between ranks, naming the first tensor and the rank."""
        described = self.objects(_described(model, buffers))
        first = described[0]
        for rank, other in enumerate(described[1:], 1):
            if first.keys() == other.keys() and list(first) != list(other):
                raise RankError(
                    f"the models of the ranks have their layers in different orders: {list(first)} "
                    f"on rank 0 and {list(other)} on rank {rank}; register them in one order"
                )
            for name in [*first, *(n for n in other if n not in first)]:
                if first.get(name) == other.get(name):
                    continue
                ours, theirs = _told(first.get(name)), _told(other.get(name))
                if ours == theirs:
                    ours, theirs = "of one value", "of another"
                raise RankError(
                    f"the models of the ranks differ: {name!r} is {ours} on rank 0 and {theirs} on "
                    f"rank {rank}; load the same weights on every rank, or wrap the model in "
                    "DistributedDataParallel (which leaves each rank its own batch-norm statistics)"
                )
        self.check_same(
            modules_in_words(model, modes=buffers),
            "have different models",
            "build the same one on every rank",
        )


class _Tensor:
    """The place of a tensor in a broadcast nest."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


def _outline(tree: Any, tensors: list[Tensor]) -> Any:
    """The nest with a `_Tensor` for each tensor, which are appended to `tensors`."""
    if isinstance(tree, dict):
        return {key: _outline(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_outline(value, tensors) for value in tree]
    if not isinstance(tree, Tensor):
        return tree
    tensors.append(tree)
    return _Tensor(tree)


def _described(model: nn.Module, buffers: bool) -> dict[str, tuple[str, str, str]]:
    """Shape, dtype and digest of the values of every parameter and, if asked for, buffer."""
    found, model = {}, unwrapped(model)
    kept = model.state_dict() if buffers else dict(model.named_parameters())
    for name, tensor in kept.items():
        if isinstance(tensor, Tensor):
            found[name] = _digested(tensor)
    return found


def _digested(tensor: Tensor) -> tuple[str, str, str]:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.blake2b(raw.tobytes(), digest_size=16).hexdigest()
    return str(tuple(tensor.shape)), str(tensor.dtype), digest


def _told(described: tuple[str, str, str] | None) -> str:
    return "absent" if described is None else " ".join(described[:2])


def _known(error: T) -> T:
    """An error of which all ranks know."""
    error.known_to_ranks = True  # type: ignore[attr-defined]
    return error


def _is_known(error: BaseException | None) -> bool:
    """Whether all ranks know of an error, or of the one that it was made of."""
    while error is not None:
        if isinstance(error, RankError) or getattr(error, "known_to_ranks", False):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: RuntimeError) -> str:
    line = str(error).partition("\n")[0].partition(" This is typically")[0]
    return re.sub(r"^\[\S*\] ", "", line).rstrip(".")


def answering(ranks: Ranks | None, doing: str) -> AbstractContextManager[None]:
    """`ranks.answering(doing)`, and nothing for a single process."""
    return nullcontext() if ranks is None else ranks.answering(doing)


def jointly(ranks: Ranks | None, doing: str) -> AbstractContextManager[None]:
    """`ranks.together(doing)`, and nothing for a single process."""
    return nullcontext() if ranks is None else ranks.together(doing)


def in_words(value: Any) -> str:
    """A value in words that are the same in every process: no address, digests for tensors."""
    if isinstance(value, Tensor):
        return " ".join(_digested(value))
    if isinstance(value, torch.Generator):
        return f"Generator {_digested(value.get_state())[-1]}"
    if isinstance(value, nn.Module):
        state = [" ".join(found) for found in _described(value, buffers=True).values()]
        return " ".join([*modules_in_words(value).values(), *state])
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {in_words(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_words, value))}]"
    if isinstance(value, set | frozenset):
        return f"[{', '.join(sorted(map(in_words, value)))}]"
    if is_dataclass(value) and not isinstance(value, type):
        found = [f"{each.name}={in_words(getattr(value, each.name))}" for each in fields(value)]
        return f"{type(value).__name__}({', '.join(found)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def modules_in_words(model: nn.Module, modes: bool = False) -> dict[str, str]:
    """Every module's class, and the options of torch's own; with `modes` also which one trains."""
    found = {}
    for name, module in unwrapped(model).named_modules():
        kept = ("training",) if modes else ()
        if type(module).__module__.startswith("torch.nn"):
            kept = tuple(k for k in vars(module) if k[0] != "_" and (modes or k != "training"))
        kinds = (bool, int, float, str, tuple, type(None))
        options = {k: vars(module)[k] for k in kept if isinstance(vars(module)[k], kinds)}
        said = ", ".join(f"{key}={value!r}" for key, value in options.items())
        found[f"module {name!r}" if name else "the model"] = f"{type(module).__name__}({said})"
    return found


def parallel(model: nn.Module) -> bool:
    """Whether several ranks train the model, or one that holds it and whose forward pass runs."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module() or model
    return Ranks.of(wrapper) is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel: its layers have the names they always had.

    Raises `RankError` for a model sharded by FSDP, `TypeError` for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a torch.nn.Module, got {type(model).__name__}")
    if not dist.is_available():
        return model
    sharded = _sharded(model)
    if sharded:
        raise RankError(
            f"{sharded} is sharded (FSDP): no rank holds a whole weight, and a layer's block is "
            "made of the whole weight's inputs and gradients; use DistributedDataParallel"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    return model


def _sharded(model: nn.Module) -> str | None:
    if not dist.is_initialized():
        return None  # no parameter can be sharded without a process group
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            return f"module {name!r}" if name else "the model"
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            return f"parameter {name!r}"
    return None


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def start() -> Ranks | None:
    """Join the job that `torchrun` started, by gloo or, on a machine with GPUs, nccl.

    None for a program that was started on its own.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        return None
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return Ranks.current()
