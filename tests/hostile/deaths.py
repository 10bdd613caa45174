"""Ranks that are killed at random: the others name them, and the job begun again ends the same.

`PYTHONPATH=tests python -m hostile.deaths --seeds 10` kills one of two and one of four ranks so
often, before, within or after a collective of a comparison or of a training.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fisherlab as fl
from fisherlab import whole
from fisherlab.experiments.columns import steady

STEPS = 4
# a comparison, and a method for each way in which ranks work together
WORK = ("compare", "kfac", "ekfac", "exact", "tengrad", "fngd", "ngd", "adapted")
TIMEOUT = datetime.timedelta(seconds=120)


@dataclass(frozen=True)
class Death:
    """The rank that dies, at which of its collectives, and whether before, in or after it."""

    rank: int
    number: int
    place: str

    @classmethod
    def drawn(cls, seed: int, world: int, collectives: int) -> Death:
        draw = random.Random(f"{seed} of {world}")
        place = draw.choice(("before", "in", "after"))
        return cls(draw.randrange(world), draw.randint(1, collectives), place)


class Counted:
    """Counts this rank's collectives, and kills it at one of them."""

    def __init__(self, death: Death | None) -> None:
        self.death, self.number, self.real = death, 0, fl.distributed.Ranks._sending

    def die(self, place: str) -> None:
        if self.death is None or (self.number, place) != (self.death.number, self.death.place):
            return
        if place == "in":
            threading.Timer(0.001, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        counted = self

        @contextmanager
        def sending(self: fl.distributed.Ranks) -> Iterator[Any]:
            counted.number += 1
            counted.die("before")
            with counted.real(self) as group:
                counted.die("in")
                yield group
            counted.die("after")

        fl.distributed.Ranks._sending = sending  # type: ignore[method-assign]


def trained(name: str, rank: int, world: int, folder: Path) -> torch.Tensor:
    """The parameters after a few steps, of which rank 0 leaves a checkpoint each."""
    model = ranks.net()
    wrapped = DistributedDataParallel(model)
    opt, path, done = ranks.OPTIMIZERS[name](wrapped), folder / "checkpoint.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        done = state["done"]
    for step in range(done, STEPS):
        x, y = ranks.shard(rank, ranks.CUTS["equal"][world], *ranks.data(10 + step))

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(wrapped(x), y)
            loss.backward()
            return loss

        opt.step(closure)
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": opt.state_dict(), "done": step + 1}
            whole.write_tensors(path, state)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compared(rank: int, world: int) -> str:
    """The table of a comparison of shards, to the last digit."""
    x, y = ranks.shard(rank, ranks.CUTS["unequal"][world], *ranks.data())
    options = {"approximations": ["kfac", "tekfac"], "dampings": 0.1}
    frame = fl.compare(ranks.net(), nn.CrossEntropyLoss(), x, y, **options).frame
    return str(steady(frame).to_json(double_precision=15))


def work(rank: int, world: int, folder: Path, what: str, death: Death | None) -> None:
    """One rank: its result and its count of collectives, or what it says where it fails."""
    torch.set_num_threads(1)
    counted = Counted(death if death is not None and death.rank == rank else None)
    store = f"file://{folder}/{'again' if death is None else 'killed'}"
    try:
        dist.init_process_group(
            "gloo", init_method=store, timeout=TIMEOUT, world_size=world, rank=rank
        )
        counted.install()
        result = compared(rank, world) if what == "compare" else trained(what, rank, world, folder)
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        return
    torch.save((result, counted.number), folder / f"{rank}.pt")


def job(world: int, folder: Path, what: str, death: Death | None = None) -> list[Any]:
    """Each rank's result with its count of collectives, its words, or None where it was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("?.pt"), *folder.glob("?.txt")]:
        path.unlink()
    context = get_context("spawn")
    every = [
        context.Process(target=work, args=(rank, world, folder, what, death))
        for rank in range(world)
    ]
    for process in every:
        process.start()
    for process in every:
        process.join(10 * TIMEOUT.total_seconds())
        if process.is_alive():
            process.kill()
            raise AssertionError(f"a rank of {what} never ended after {death}")
    found: list[Any] = []
    for rank in range(world):
        ended, said = folder / f"{rank}.pt", folder / f"{rank}.txt"
        found.append(
            torch.load(ended) if ended.exists() else said.read_text() if said.exists() else None
        )
    return found


def faults(world: int, what: str, seed: int, unharmed: list[Any], folder: Path) -> list[str]:
    """Faults after the death of a seed: nobody named it, or the next job ended otherwise."""
    death = Death.drawn(seed, world, min(count for _, count in unharmed))
    found = []
    for rank, end in enumerate(job(world, folder, what, death)):
        if rank == death.rank:
            if end is not None:
                found.append(f"{death} did not die: {end}")
        elif isinstance(end, str):
            # DDP's own collectives fail with gloo's words
            named = end.startswith("RankError") and f"rank {death.rank}" in end
            if not named and "closed by peer" not in end and "reset by peer" not in end:
                found.append(f"rank {rank} after {death}: {end}")
        elif end is None or not same(end, unharmed[rank]):
            found.append(f"rank {rank} ended with another result after {death}")
    again = job(world, folder, what)
    for rank, end in enumerate(again):
        if not isinstance(end, tuple) or not same(end, unharmed[rank]):
            found.append(f"the job after {death} ended otherwise on rank {rank}: {end}")
    return found


def same(one: tuple[Any, int], other: tuple[Any, int]) -> bool:
    """Whether two results agree: DDP adds those of four ranks in an order of its own."""
    if isinstance(other[0], str):
        return bool(one[0] == other[0])
    return bool((one[0] - other[0]).abs().max() < 1e-12)


def deaths(world: int, seeds: range, folder: Path) -> Counter[str]:
    """The outcomes of the deaths of all seeds, each printed."""
    unharmed: dict[str, list[Any]] = {}
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        what = WORK[seed % len(WORK)]
        if what not in unharmed:
            unharmed[what] = job(world, folder / f"unharmed {what}", what)
        wrong = faults(world, what, seed, unharmed[what], folder / f"{seed}")
        outcomes["; ".join(wrong) or "identical"] += 1
        said = "; ".join(wrong) or "identical"
        print(f"{world} ranks, {what}, seed {seed}: {said}", file=sys.stderr, flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10, help="for two ranks, and for four")
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    for world in (2, 4):
        folder = Path(tempfile.mkdtemp())
        found = deaths(world, range(asked.first, asked.first + asked.seeds), folder)
        print(f"{world} ranks: {dict(found)}")


if __name__ == "__main__":
    main()
