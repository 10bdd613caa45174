"""The same works by other libraries, each where it is installed.

Every function returns a call that does from scratch what the row of the table says: the passes
through the model, the statistics, and the product with the gradient.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fisherlab.experiments.bench.setting import Network
from fisherlab.experiments.bench.timing import Work

PACKAGES = {
    "BackPACK": "backpack",
    "curvlinops": "curvlinops",
    "opacus": "opacus",
    "NNGeometry": "nngeometry",
    "torch.func": "torch",
}
DAMPING = 1e-3


def installed() -> list[str]:
    """The peers that can be imported here."""
    return [name for name, package in PACKAGES.items() if find_spec(package)]


def grams(network: Network) -> dict[str, Work]:
    """Per-layer Gram matrices of per-example gradients: all of them formed, then one product."""
    makers = {"BackPACK": _by_backpack, "opacus": _by_opacus, "torch.func": _by_functions}
    return {peer: _gram_of(make(network)) for peer, make in makers.items() if peer in installed()}


def _gram_of(gradients: Callable[[], list[Tensor]]) -> Work:
    def run() -> list[Tensor]:
        return [g.flatten(1) @ g.flatten(1).mT for g in gradients()]

    return run


def _by_backpack(network: Network) -> Callable[[], list[Tensor]]:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    # extend() leaves hooks behind: on a copy
    model, criterion = extend(copy.deepcopy(network.model)), extend(nn.CrossEntropyLoss())

    def run() -> list[Tensor]:
        model.zero_grad()
        with warnings.catch_warnings(), backpack(BatchGrad()):
            warnings.simplefilter("ignore")  # the first layer's input needs no gradient
            criterion(model(network.x), network.y).backward()
        found = [p.grad_batch for p in model.parameters()]
        for parameter in model.parameters():
            del parameter.grad_batch
        return found

    return run


def _by_opacus(network: Network) -> Callable[[], list[Tensor]]:
    from opacus.grad_sample import GradSampleModule

    # it records activations in training mode only
    model = GradSampleModule(copy.deepcopy(network.model)).train()

    def run() -> list[Tensor]:
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network.criterion(model(network.x), network.y).backward()
        found = [p.grad_sample for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad_sample = None
        return found

    return run


def _by_functions(network: Network) -> Callable[[], list[Tensor]]:
    parameters = {name: p.detach() for name, p in network.model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(network.model, values, (x[None],))
        return network.criterion(outputs, y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda: list(each(parameters, network.x, network.y).values())


def builds(network: Network, method: str, fisher_type: str, inverse: bool) -> dict[str, Work]:
    """KFAC or EKFAC of one batch times the gradient, with or without the damped inverse."""
    found: dict[str, Work] = {}
    if "curvlinops" in installed() and method in ("kfac", "ekfac"):
        found["curvlinops"] = _curvlinops(network, method, fisher_type, inverse)
    if "NNGeometry" in installed() and method in ("kfac", "ekfac") and fisher_type != "empirical":
        found["NNGeometry"] = _nngeometry(network, method, fisher_type, inverse)
    return found


def _curvlinops(network: Network, method: str, fisher_type: str, inverse: bool) -> Work:
    import curvlinops

    kinds = {"exact": "type-2", "mc": "mc", "empirical": "empirical"}
    operators = {"kfac": curvlinops.KFACLinearOperator, "ekfac": curvlinops.EKFACLinearOperator}
    parameters = list(network.model.parameters())
    network.step()
    gradients = [p.grad.detach().clone() for p in parameters if p.grad is not None]
    options: dict[str, Any] = {"separate_weight_and_bias": False, "check_deterministic": False}

    def run() -> object:
        block = operators[method](
            network.model,
            network.criterion,
            parameters,
            [(network.x, network.y)],
            fisher_type=kinds[fisher_type],
            **options,
        )
        if not inverse:
            return block @ gradients
        inverted = curvlinops.KFACInverseLinearOperator(
            block, damping=DAMPING, use_exact_damping=True
        )
        return inverted @ gradients

    return run


def _nngeometry(network: Network, method: str, fisher_type: str, inverse: bool) -> Work:
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatEKFAC, PMatKFAC, PVector
    from torch.utils.data import DataLoader, TensorDataset

    form = {"kfac": PMatKFAC, "ekfac": PMatEKFAC}[method]
    loader = DataLoader(TensorDataset(network.x, network.y), batch_size=len(network.x))
    network.step()
    gradient = PVector.from_model_grad(network.model)

    def run() -> object:
        options = {"representation": form, "device": network.x.device}
        if fisher_type == "mc":
            block = FIM_MonteCarlo(network.model, loader, **options)
        else:
            block = FIM(network.model, loader, **options)
        if method == "ekfac":
            block.update_diag(loader)
        return block.inverse(DAMPING).mv(gradient) if inverse else block.mv(gradient)

    return run
