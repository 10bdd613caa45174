"""A reloaded optimizer damps its blocks anew as the one that was saved would have."""

import io

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.approximations.damping import levenberg_marquardt

CASES = [
    fl.KFAC(),
    fl.EKFAC(),
    fl.Eva(),
    fl.KFAC(placement="factored"),
    fl.TKFAC(placement="factored"),
    fl.TEKFAC(),
    fl.Shampoo(),
    fl.Shampoo(form="squared"),
    fl.IFANG(),
    fl.IFANG(rows=3),
]


@pytest.mark.parametrize("approximation", CASES, ids=repr)
def test_levenberg_marquardt_goes_on_from_a_reloaded_state(
    approximation: fl.approximations.Approximation,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 12, 5, generator=generator)
    y = torch.randint(0, 3, (6, 12), generator=generator)

    def fresh() -> tuple[nn.Module, fl.optim.NaturalGradient]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        return model, fl.optim.NaturalGradient(
            model, approximation, lr=0.01, damping=levenberg_marquardt(100.0, every=1),
            statistics_every=2, basis_every=4,
        )  # fmt: skip

    def steps(model: nn.Module, optimizer: fl.optim.NaturalGradient, which: range) -> list[float]:
        losses = []
        for k in which:

            def closure(k: int = k) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[k].double()), y[k])
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        return losses

    expected = steps(*fresh(), range(6))
    model, optimizer = fresh()
    found = steps(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model, optimizer = fresh()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert found + steps(model, optimizer, range(3, 6)) == expected
