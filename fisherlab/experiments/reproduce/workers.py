"""Run folders in several processes at once, which training leaves resumable."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from fisherlab.experiments import training
from fisherlab.experiments.reproduce.plan import Planned, seconds_of
from fisherlab.experiments.rundir import RunDir
from fisherlab.experiments.training.worker import COMPLETE, Worker


def complete(plan: Planned, folder: Path) -> bool:
    """Whether a run folder holds these settings, trained to their end."""
    try:
        same = training.Settings.load(folder) == plan.settings
        return same and RunDir(folder).config.get("status") == COMPLETE
    except (OSError, ValueError):
        return False


def train_all(
    plans: Sequence[tuple[Planned, Path]],
    jobs: int,
    ended: Callable[[Planned, str, int], None],
) -> None:
    """Train every folder that is not complete, `jobs` at once, the longest first.

    `ended` hears the status of each, and how many are left. Ctrl-C ends the workers at their next
    step, and what they did is kept. A worker of a killed parent ends by itself.
    """
    left = [(plan, folder) for plan, folder in plans if not complete(plan, folder)]
    queue = deque(sorted(left, key=lambda job: -seconds_of(job[0])))
    workers = [Worker() for _ in range(min(jobs, len(queue)))]
    free = list(workers)
    running: dict[Future[str], tuple[Worker, Planned]] = {}
    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        try:
            while queue or running:
                while queue and free:
                    (plan, folder), worker = queue.popleft(), free.pop()
                    running[pool.submit(worker.train, plan.settings, folder)] = worker, plan
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    worker, plan = running.pop(future)
                    free.append(worker)
                    ended(plan, future.result(), len(queue) + len(running))
        except BaseException:
            for worker in workers:
                worker.interrupt()
            raise
        finally:
            for worker in workers:
                worker.end()
