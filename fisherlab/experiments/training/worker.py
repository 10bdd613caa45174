"""A process of one thread that trains one run folder after the other for its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, cast

import torch

import fisherlab
from fisherlab.experiments.checkpoint import CheckpointError
from fisherlab.experiments.training.loop import Watch, train
from fisherlab.experiments.training.settings import Settings, SettingsError

COMPLETE, INTERRUPTED = "complete", "interrupted"
# Ctrl-C before the worker has begun leaves nothing to keep; its one argument is the parent.
PROGRAM = (
    "import os, signal, sys; signal.signal(signal.SIGINT, lambda *_: os._exit(130)); "
    f"from {__name__} import main; main(int(sys.argv[1]))"
)
# Settings of every library that a worker may use, before it is imported.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Worker:
    """The parent's side: a process that takes settings and folders, one at a time."""

    def __init__(self) -> None:
        here = str(Path(fisherlab.__file__).parents[1])
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C of a terminal goes to the parent alone
        )
        self.to = cast(IO[str], self.process.stdin)
        self.back = cast(IO[str], self.process.stdout)

    def train(self, settings: Settings, folder: Path) -> str:
        """Train a folder; the status of it.

        Raises:
            SettingsError: the folder or the settings are refused, or the process is gone.
            KeyboardInterrupt: somebody interrupted the process.
        """
        job = {"settings": settings.to_json(), "folder": str(folder)}
        said: dict[str, str] = {}
        try:
            print(json.dumps(job), file=self.to, flush=True)
            said = json.loads(self.back.readline() or "{}")
        except BrokenPipeError:
            pass
        if not said:
            code = self.process.wait()
            again = "the same command goes on from what is there"
            said = {"refused": f"the worker of {folder} ended with code {code}; {again}"}
        if "refused" in said:
            raise SettingsError(said["refused"])
        if said["status"] == INTERRUPTED:
            raise KeyboardInterrupt
        return said["status"]

    def interrupt(self) -> None:
        """Ctrl-C, which training ends with what it has."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Wait for the process, which gets no more work."""
        self.to.close()
        self.process.wait()
        self.back.close()


# In the worker ------------------------------------------------------------------------------------


class Stops(Watch):
    """Ends the training at a step where Ctrl-C came before."""

    def __init__(self) -> None:
        self.asked = False
        # an exception of a handler would get lost in a destructor
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, *_: Any) -> None:
        """Remember Ctrl-C."""
        self.asked = True

    def stepped(self, loss: float) -> None:
        if self.asked:
            raise KeyboardInterrupt


def trained(job: dict[str, Any], watch: Watch) -> dict[str, str]:
    """The status of a folder after its training, or why it is refused."""
    try:
        results = train(Settings.from_json(job["settings"]), job["folder"], watch=watch)
    except (SettingsError, CheckpointError, OSError) as error:
        return {"refused": str(error)}
    return {"status": INTERRUPTED if results.interrupted else COMPLETE}


def end_with(parent: int) -> None:
    """End this process as soon as its parent is gone: it keeps the folder from the next run."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)


def main(parent: int) -> None:
    """Train a folder per line of standard input, and answer each with a line.

    Args:
        parent: the process that sends the lines; it may be gone already.
    """
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    answers, sys.stdout = sys.stdout, sys.stderr  # prints of a library are no answer
    torch.set_num_threads(1)
    watch = Stops()
    for line in sys.stdin:
        said = trained(json.loads(line), watch)
        print(json.dumps(said), file=answers, flush=True)
        if watch.asked:
            break
