"""Points of a search by Optuna: any number of processes, on one machine or many, share a study.

A study lives in a database; it holds numbers and words, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisherlab import whole
from fisherlab.experiments.space import Point, Range, Space, entry_of
from fisherlab.experiments.training import Entry, SettingsError

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

FILE = "study.db"
HINT = "pip install 'fisherlab[sweep]'"
# Seconds between signs of life of a worker, and without one until others take its point.
BEAT, GRACE = 20, 90
# Seconds after which a worker that took a point, and wrote no name to it, was killed.
NAMED = 10.0
FEWEST = 10  # points with a result below which no importance is told
# Trains the point of a label; the second argument takes the metric of every epoch.
Train = Callable[[Entry, Callable[[float, int], None]], Point]


def installed() -> bool:
    """Whether Optuna can be imported."""
    return find_spec("optuna") is not None


def url_of(folder: Path, storage: str | None) -> str:
    """The address of the database: the given one, or an SQLite file in the folder."""
    import sqlalchemy

    if storage is None:
        folder.mkdir(parents=True, exist_ok=True)
        return str(sqlalchemy.URL.create("sqlite", database=str(folder / FILE)))
    return storage


def shown(url: str) -> str:
    """The address without its password."""
    return re.sub(r"(?<=://)([^/@:]*):[^/]*@", r"\1:***@", url)


def every(space: Space) -> list[tuple[str, ...]]:
    """Every combination of the values of a space."""
    return list(product(*(values for values in space.values() if isinstance(values, list))))


def exhausted(space: Space, trials: int) -> bool:
    """Whether so many points are all that a space has."""
    ranges = any(isinstance(values, Range) for values in space.values())
    return not ranges and len(every(space)) <= trials


@contextmanager
def named(url: str, *others: type[Exception]) -> Iterator[None]:
    """Name the database in what goes wrong with it."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    wrong: tuple[type[Exception], ...] = (
        SQLAlchemyError,
        optuna.exceptions.OptunaError,
        *others,
    )
    try:
        yield
    except wrong as error:
        cause = error.__cause__ or error
        said = str(getattr(cause, "orig", None) or cause).splitlines()[0]
        damaged = "not a database" in said or "malformed" in said
        step = "delete the damaged file" if damaged else "try again"
        raise SettingsError(
            f"{shown(url)} is no database for a search: {said}; {step}, or give another --storage"
        ) from None


def _storage(url: str) -> optuna.storages.RDBStorage:
    """The database, with its tables; two workers that begin together may both make them."""
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError

    opened = partial(
        optuna.storages.RDBStorage,
        url,
        heartbeat_interval=BEAT,
        grace_period=GRACE,
        heartbeat_stale_trial_callback=again,
    )
    for wait in (0.1, 0.3, 1.0, 3.0):
        try:
            return opened()
        except (IntegrityError, OperationalError):
            time.sleep(wait)  # the other worker's tables are there by then
    return opened()


class Study:
    """The points of one optimizer, those of other workers among them.

    Its name is made of everything that determines a point's result: the same command joins the
    same study, another one never meets it.

    Args:
        url: the database.
        name: the optimizer.
        space: its options.
        settings: of a run of one point, as JSON.
        higher_is_better: the direction of the metric.
        trials: points by TPE; None takes every point of the grid, and so does a number that is
            enough for all of them.
    """

    def __init__(
        self,
        url: str,
        name: str,
        space: Space,
        settings: dict[str, Any],
        *,
        higher_is_better: bool,
        trials: int | None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.url, self.name, self.space = url, name, space
        self.grid = None if trials and not exhausted(space, trials) else every(space)
        self.trials = len(self.grid) if self.grid is not None else int(trials or 0)
        tpe = self.grid is None
        told = {**settings, "space": {o: str(v) for o, v in space.items()}, "tpe": tpe}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        with named(url, ImportError, RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = _storage(url)
            self.study = optuna.create_study(
                storage=storage,
                sampler=self._sampler(),
                study_name=f"fisherlab-{name}-{digest}",
                direction="maximize" if higher_is_better else "minimize",
                load_if_exists=True,
            )

    def run(self, train: Train) -> None:
        """Train points until none is left that nobody has taken."""
        import optuna

        # the trial at hand, and what ended it
        number, failure = -1, None

        def objective(trial: Trial) -> float:
            nonlocal number, failure
            number, failure = trial.number, None
            try:
                trial.set_user_attr("worker", [socket.gethostname(), os.getpid()])
                if self._late(trial):
                    raise _Late
                point = self._trained(trial, train)
                trial.set_user_attr("point", asdict(point))
            except BaseException as error:
                failure = error
                mine = self._trial(number)
                if not (isinstance(error, _Late) or mine.state.is_finished()):
                    again(self.study, mine)
                raise
            if point.value is None:
                raise optuna.TrialPruned(point.note)
            return point.value

        with named(self.url):
            while self._left():
                try:
                    self.study.optimize(objective, n_trials=1, catch=(_Late,))
                except Exception as error:
                    # silent for so long that another worker took it over: Optuna says so in three
                    # ways, and in place of what ended it here
                    if error is failure or not self._trial(number).state.is_finished():
                        raise
                    taken = optuna.exceptions.UpdateFinishedTrialError, _Late
                    if failure is not None and not isinstance(failure, taken):
                        raise failure from None

    @property
    def points(self) -> list[Point]:
        """Every point that ended, by its label."""
        from optuna.trial import TrialState

        with named(self.url):
            done = self._of(TrialState.COMPLETE, TrialState.PRUNED)
        found = {int(trial.user_attrs["number"]): trial.user_attrs["point"] for trial in done}
        return [Point(**found[number]) for number in sorted(found)]

    @property
    def elsewhere(self) -> int:
        """Points that other workers have taken, or that wait for one."""
        from optuna.trial import TrialState

        with named(self.url):
            return len(self._of(TrialState.RUNNING, TrialState.WAITING))

    def importance(self) -> dict[str, float]:
        """The share of the metric's variance that each option explains (fANOVA); {} where unknown.

        It is unknown from fewer than `FEWEST` points, and from one option alone.
        """
        import optuna

        ended = [point for point in self.points if point.value is not None]
        moved = [o for o in self.space if len({p.options[o] for p in ended}) > 1]
        if len(ended) < FEWEST or len(moved) < 2 or len({p.value for p in ended}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        with named(self.url):
            found = optuna.importance.get_param_importances(
                self.study, evaluator=evaluator, params=moved
            )
        return {option: float(share) for option, share in found.items()}

    def _of(self, *states: optuna.trial.TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _trial(self, number: int) -> FrozenTrial:
        """A trial as the database has it now."""
        return self.study.get_trials(deepcopy=False)[number]

    def _left(self) -> bool:
        """Whether a point waits, or may still be made."""
        import optuna
        from optuna.trial import TrialState

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        for trial in self._of(TrialState.RUNNING):
            if self._is_dead(trial):
                again(self.study, trial)
                self._fail(trial)
        if self._of(TrialState.WAITING):
            return True
        taken = self._taken()
        return len(taken if self.grid is None else set(map(_place, taken))) < self.trials

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial is gone; one of another machine is not known."""
        end = time.monotonic() + NAMED
        # it writes its name as it begins
        while "worker" not in trial.user_attrs and not trial.state.is_finished():
            if time.monotonic() > end:
                return True
            time.sleep(0.1)
            trial = self._trial(trial.number)
        if trial.state.is_finished():
            return False
        host, process = trial.user_attrs["worker"]
        # a number of this process is that of an earlier one: between two points it has none
        dead = process == os.getpid() or not whole.alive(process)
        return host == socket.gethostname() and dead

    def _fail(self, trial: FrozenTrial) -> None:
        """End the trial of a killed worker by another sampler: a grid's own stops a study here."""
        import optuna

        plain = optuna.load_study(
            study_name=self.study.study_name,
            storage=self.study._storage,
            sampler=optuna.samplers.RandomSampler(),
        )
        plain.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def _late(self, trial: Trial) -> bool:
        """Whether another worker took the same place, or the last one, in the same moment."""
        if "number" in trial.user_attrs:
            return False  # it waited for whoever comes
        earlier = [other for other in self._taken() if other.number < trial.number]
        if self.grid is None:
            return len(earlier) >= self.trials
        mine = self._trial(trial.number)
        return _place(mine) in map(_place, earlier)

    def _taken(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return self._of(TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)

    def _trained(self, trial: Trial, train: Train) -> Point:
        """The point of a trial; of a grid, its place among all combinations is its label."""
        options = {option: self._suggested(trial, option) for option in self.space}
        number = trial.user_attrs.get("number", trial.number)
        if self.grid is not None:
            number = self.grid.index(tuple(options.values()))
        trial.set_user_attr("number", number)
        label = f"{self.name}-{number + 1}"
        try:
            (entry,) = entry_of(label, self.name, options)
        except SettingsError as error:  # each value was taken alone, not all together
            return Point(label, self.name, options, "refused", str(error))
        return train(entry, trial.report)

    def _suggested(self, trial: Trial, option: str) -> str:
        values = self.space[option]
        if not isinstance(values, Range):
            return str(trial.suggest_categorical(option, values))
        if values.whole:
            low, high = int(values.low), int(values.high)
            return str(trial.suggest_int(option, low, high, log=values.logarithmic))
        value = trial.suggest_float(option, values.low, values.high, log=values.logarithmic)
        return f"{value:.4g}"

    def _sampler(self) -> Any:
        import optuna

        if self.grid is not None:
            return optuna.samplers.GridSampler(
                {o: v for o, v in self.space.items() if isinstance(v, list)}, seed=0
            )

        class Numbered(optuna.samplers.BaseSampler):
            """TPE whose draws depend on the points before a trial alone, and on their number.

            A search that was killed goes on as it would have; no two workers draw alike.
            """

            def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
                failed = optuna.trial.TrialState.FAIL
                earlier = study.get_trials(deepcopy=False)[: trial.number]
                seed = sum(other.state != failed for other in earlier)
                self.tpe = optuna.samplers.TPESampler(seed=seed)
                self.tpe.before_trial(study, trial)

            def infer_relative_search_space(self, *args: Any) -> Any:
                return self.tpe.infer_relative_search_space(*args)

            def sample_relative(self, *args: Any) -> Any:
                return self.tpe.sample_relative(*args)

            def sample_independent(self, *args: Any) -> Any:
                return self.tpe.sample_independent(*args)

        return Numbered()


class _Late(Exception):
    """Another worker has the point."""


def _place(trial: FrozenTrial) -> int:
    """The place in the grid; the first trials have the places of their numbers."""
    return int(trial.system_attrs.get("grid_id", trial.number))


def again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Put a point that was begun and not ended into the queue; its checkpoint is taken over."""
    import optuna

    waiting = optuna.trial.create_trial(
        state=optuna.trial.TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={k: v for k, v in trial.user_attrs.items() if k == "number"},
        system_attrs=trial.system_attrs,
    )
    study.add_trial(waiting)
