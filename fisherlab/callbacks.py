"""`Monitor` inside a loop that is not one's own: Lightning's Trainer, and that of transformers.

Both make a `fl.Monitor` of the running optimizer at the first step, and call it after each step.
`log(values, step)` is the whole protocol of a logger: `wandb.log` and `trackio.log` fit, and
`fl.monitoring.to_tensorboard(writer)` makes one of a TensorBoard writer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fisherlab.distributed import unwrapped
from fisherlab.extras import named
from fisherlab.monitoring import Monitor


class _Watch:
    """A monitor that is made at the first step, when the optimizer is known."""

    def __init__(self, criterion: Callable[..., Any] | None, options: dict[str, Any]) -> None:
        self.criterion, self.options = criterion, options
        self.monitor: Monitor | None = None

    def look(self, optimizer: Any, model: nn.Module, *batch: Any) -> None:
        """One call of the monitor."""
        if self.monitor is None:
            while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
                optimizer = inner  # accelerate's wrapper
            self.monitor = Monitor(optimizer, model, self.criterion, **self.options)
        self.monitor(*batch)


def lightning(
    criterion: Callable[..., Any], *, model: nn.Module | None = None, **options: Any
) -> Any:
    """A Lightning callback: `Trainer(callbacks=[fl.callbacks.lightning(criterion, every=100)])`.

    The batches are pairs `(x, y)`. Without `log` the numbers go to the Trainer's own loggers.

    Args:
        criterion: the loss.
        model: the part of the module that has the weights; None: the whole, called as `module(x)`.
        options: options of `fl.Monitor`.

    Returns:
        The callback, with the monitor at `callback.watch.monitor`.

    Raises:
        ImportError: Lightning is not installed.
    """
    with named():
        base = import_module("lightning.pytorch").Callback

    class Callback(base):  # type: ignore[misc, valid-type]
        """Calls the monitor after each batch that ended in a step."""

        def __init__(self) -> None:
            self.watch, self.steps = _Watch(criterion, dict(options)), 0

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            if trainer.global_step == self.steps:
                return  # gradients are being accumulated
            self.steps = trainer.global_step
            if options.get("log") is None:
                self.watch.options["log"] = lambda values, step: [
                    logger.log_metrics(dict(values), step) for logger in trainer.loggers
                ]
            self.watch.look(trainer.optimizers[0], model or module, *batch)

    return Callback()


def trainer(
    criterion: Callable[..., Any] | None = None, *, loss_scale: str | None = None, **options: Any
) -> Any:
    """A callback of transformers: `Trainer(..., callbacks=[fl.callbacks.trainer(every=100)])`.

    The Trainer shows no batch to its callbacks, so a hook on the model keeps the arguments of the
    last forward pass of the training, without a copy, from the start of the training to its end.

    Args:
        criterion: the loss of the model's outputs; None: the loss inside the model.
        loss_scale: "mean" or "sum", how that combines the losses of examples; None: "mean" without
            a criterion.
        options: options of `fl.Monitor`.

    Returns:
        The callback, with the monitor at `callback.watch.monitor`.

    Raises:
        ImportError: transformers is not installed.
    """
    with named():
        base = import_module("transformers").TrainerCallback
    options = {**options, "loss_scale": loss_scale or ("mean" if criterion is None else None)}

    class Callback(base):  # type: ignore[misc, valid-type]
        """Keeps the batch of each forward pass and calls the monitor after each step."""

        def __init__(self) -> None:
            self.watch = _Watch(criterion, options)
            self.batch: Mapping[str, Any] = {}
            self.hook: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            def keep(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
                if module.training:
                    self.batch = dict(named)

            self.hook = unwrapped(found["model"]).register_forward_pre_hook(keep, with_kwargs=True)

        def on_step_end(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            self.watch.look(found["optimizer"], found["model"], self.batch)

        def on_train_end(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            self.hook.remove()
            self.batch = {}

    return Callback()
