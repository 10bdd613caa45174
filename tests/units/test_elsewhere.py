"""Everything on a stand-in accelerator: no tensor of the CPU is mixed in, and the numbers agree."""

import copy
import dataclasses
import warnings

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from standin import DEVICE, REAL, Accelerator, here, there
from torch import Tensor, nn

import fisherlab as fl
from fisherlab import approximations, blocks, metrics, plots
from fisherlab.approximations.damping import PLACEMENTS

TYPES = ("exact", "mc", "empirical")
# other kernels round otherwise
SEEN = {torch.float64: 1e-6 if REAL else 1e-9, torch.float32: 1e-2 if REAL else 1e-3}


class Net(nn.Module):
    """A convolution with full bases and one in groups, thin linear maps, a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 10, 3, padding=1)
        self.groups = nn.Conv2d(10, 4, 3, groups=2, stride=2)
        self.norm = nn.LayerNorm(4)
        self.words = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.groups(torch.tanh(self.conv(x))).flatten(2).mean(2)
        return self.out(self.norm(h + self.words((x[:, 0, 0, 0] > 0).long())))


def problem(dtype: torch.dtype = torch.float64, n: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = Net().to(dtype)
    x = torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
    return model, x, torch.randint(3, (n,), generator=generator)


def agree(found: object, expected: object, rtol: float = SEEN[torch.float64]) -> None:
    """The same structure of tensors, those on the accelerator with the numbers of the CPU's."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(
            here(found), expected.detach(), rtol=rtol, atol=rtol, equal_nan=True
        )
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rtol, abs=rtol, nan_ok=True)
    elif isinstance(expected, list | tuple):
        for one, two in zip(found, expected, strict=True):
            agree(one, two, rtol)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        agree(list(found.values()), list(expected.values()), rtol)
    elif hasattr(expected, "__dict__"):
        agree(vars(found), vars(expected), rtol)
    else:
        assert found == expected


# --- the stand-in itself --------------------------------------------------------------------------

HERE, NUMBER = torch.ones(3), torch.tensor(2.0)
REFUSED = {
    "product": lambda s: s @ HERE,
    "sum": lambda s: s + HERE,
    "in place": lambda s: HERE.add_(s),
    "a number of there into one of here": lambda s: NUMBER.clone().add_(s.sum()),
    "cat": lambda s: torch.cat([s, HERE]),
    "stack of numbers": lambda s: torch.stack([s.sum(), NUMBER]),
    "addcmul": lambda s: torch.addcmul(s, s, NUMBER),
    "values": lambda s: s.__setitem__(torch.tensor([0, 1]), HERE[:2]),
    "an index of there": lambda s: HERE[s.long() * 0],
    "generator": lambda s: torch.randn(
        3, device=DEVICE, generator=torch.Generator().manual_seed(0)
    ),
    "numpy": lambda s: s.numpy(),
}
ALLOWED = {
    "a number of the CPU": lambda s: (s * NUMBER + NUMBER, 4 * HERE),
    "where": lambda s: (torch.where(s > 0, s, NUMBER), HERE),
    "an index of the CPU": lambda s: (s[torch.tensor([0, 2])], HERE[:2]),
    "a list": lambda s: (s[[0, 2]], HERE[:2]),
    "data": lambda s: (torch.tensor([1.0, 1.0, 1.0], device=s.device) * s, HERE),
    "new data": lambda s: (s.new_tensor(2.0) * s, 2 * HERE),
    "move": lambda s: ((HERE.to(s) + s).cpu() - HERE, HERE),
    "gradient": lambda s: (
        torch.autograd.grad((v := s.requires_grad_()).square().sum() / 2, v)[0],
        HERE,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_stand_in_refuses_what_cuda_does(name: str) -> None:
    with Accelerator(), pytest.raises((RuntimeError, TypeError, IndexError)):
        REFUSED[name](there(HERE))


@pytest.mark.parametrize("name", ALLOWED)
def test_the_stand_in_allows_what_cuda_does(name: str) -> None:
    with Accelerator():
        found, expected = ALLOWED[name](there(HERE))
        assert torch.equal(here(found), expected)


@pytest.mark.skipif(bool(REAL), reason="the stand-in counts")
def test_reads_are_counted_by_the_line_of_ours() -> None:
    with Accelerator() as elsewhere:
        blocks.numerics.all_finite(there(HERE))
    ((kind, line),) = elsewhere.reads
    assert kind == "number" and line.startswith("blocks/numerics.py:")


# --- capture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SEEN, ids=str)
@pytest.mark.parametrize("fisher_type", TYPES)
def test_capture(fisher_type: str, dtype: torch.dtype) -> None:
    model, x, y = problem(dtype)
    expected = fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type=fisher_type)
    assert len(expected) == 6  # all of Net: the groups one each
    with Accelerator():
        model, x, y = there((model, x, y))
        found = fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type=fisher_type)
        assert found.keys() == expected.keys()
        for name, layer in found.items():
            assert layer.device.type == DEVICE.type
            for part in ("inputs", "output_gradients", "gradient", "activation_slope"):
                agree(getattr(layer, part), getattr(expected[name], part), SEEN[dtype])


CRITERIA = {
    "weights": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1),
    "mse": nn.MSELoss(),
    "bits": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double()),
    "counts": nn.PoissonNLLLoss(),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("fisher_type", ["exact", "mc"])
def test_criteria(name: str, fisher_type: str) -> None:
    model, x, y = problem()
    if name in ("mse", "bits", "counts"):
        y = F.one_hot(y, 3).double()
    criterion, layers = CRITERIA[name], ["out"]
    if name == "smoothed" and fisher_type == "mc":
        criterion = nn.CrossEntropyLoss(ignore_index=1)
    expected = fl.capture(model, criterion, x, y, fisher_type=fisher_type, layers=layers)["out"]
    with Accelerator():
        model, criterion, x, y = there((model, criterion, x, y))
        found = fl.capture(model, criterion, x, y, fisher_type=fisher_type, layers=layers)["out"]
        agree(found.output_gradients, expected.output_gradients)


# --- compare --------------------------------------------------------------------------------------

SECONDS = ["build_seconds", "decompose_seconds", "shared_seconds", "solve_seconds"]


def compared(dtype: torch.dtype = torch.float64, **options) -> None:
    """A comparison here and there: the same table but for its seconds."""
    model, x, y = problem(dtype)
    options = {"dampings": 0.1, **options}
    expected = fl.compare(model, nn.CrossEntropyLoss(), x, y, **options)
    with Accelerator():
        options |= {k: there(v) for k, v in options.items() if isinstance(v, tuple)}
        model, x, y = there((model, x, y))
        found = fl.compare(model, nn.CrossEntropyLoss(), x, y, **options)
    one, two = (table.frame.drop(columns=SECONDS) for table in (found, expected))
    pd.testing.assert_frame_equal(one, two, rtol=SEEN[dtype], atol=SEEN[dtype])


def test_compare_with_every_approximation() -> None:
    compared(layers=["conv", "out"])


def test_compare_in_chunks_with_unseen_examples() -> None:
    _, x, y = problem(n=20)
    names = ["kfac", "tekfac", "kronecker_optimal", "shampoo"]
    compared(layers=["conv"], approximations=names, memory=20_000, reference=(x[12:], y[12:]))


@pytest.mark.parametrize("fisher_type", TYPES)
def test_compare_in_float32(fisher_type: str) -> None:
    names = ["ekfac", "tkfac", "diagonal", "mini_block", "eva"]
    layers = {"exact": ["groups"], "mc": ["norm", "words"], "empirical": ["out"]}[fisher_type]
    compared(torch.float32, layers=layers, approximations=names, fisher_type=fisher_type)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SEEN, ids=str)
@pytest.mark.parametrize("fisher_type", TYPES)
def test_compare_of_every_kind(fisher_type: str, dtype: torch.dtype) -> None:
    compared(dtype, fisher_type=fisher_type)
    compared(dtype, fisher_type=fisher_type, reference="empirical", backend="backpack")


# --- blocks, metrics and what pictures are drawn of -----------------------------------------------

UNARY = ["effective_rank", "participation_ratio", "cumulative_trace", "spectral_gap"]
OF_GRAM = ["gram_correlation", "zero_gradients", "diagonal_share", "example_coefficients"]
BINARY = ["relative_error", "absolute_error", "scaled_error", "cosine", "trace_ratio"]
BINARY += ["diagonalisation", "off_diagonal_mass", "subspace_overlap", "principal_angles"]
BINARY += ["overlap_matrix", "grouped_overlap", "population_error", "population_estimate"]
DAMPED = ["direction_cosine", "direction_error", "quadratic_decrease", "quadratic_decrease_scaled"]


def measures(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, object]:
    """Every metric of two layers, by name."""
    captures = fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type="empirical")
    layers = {name: captures[name] for name in ("conv", "out")}
    found: dict[str, object] = {"study": metrics.gram_study(layers, y)}
    for name in layers:
        layer = captures[name]
        exact = fl.Exact()(layer)
        G = layer.gradient
        found |= {f"{name} {m}": getattr(metrics, m)(exact) for m in (*UNARY, *OF_GRAM)}
        found[f"{name} split"] = metrics.kfac_error_split(exact)
        found[f"{name} mc"] = metrics.mc_convergence(exact, exact)
        found[f"{name} condition curve"] = metrics.condition_curve(exact, [0.1, 1.0])
        for method in ("kfac", "eva"):
            X = approximations.get(method)()(layer)
            which = f"{name} {method}"
            found |= {f"{which} {m}": getattr(metrics, m)(X, exact) for m in BINARY}
            found |= {f"{which} {m}": getattr(metrics, m)(X, exact, G, 0.1) for m in DAMPED}
            found[f"{which} condition"] = metrics.condition(X, exact, 0.1)
            found[f"{which} stein"] = metrics.stein_loss(X, exact, 0.1)
    return found


def test_metrics_and_the_inputs_of_pictures(quick_pictures: None) -> None:
    model, x, y = problem()
    expected = measures(model, x, y)
    with Accelerator():
        model, x, y = there((model, x, y))
        found = measures(model, x, y)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            agree(found[name], value, 1e-7)
        study, angles = found["study"], found["conv kfac principal_angles"]
        plots.eigenvalues({"exact": found["conv condition curve"]})
        plots.cumulative_trace({"exact": found["conv cumulative_trace"]})
        plots.principal_angles({"kfac": angles})
        plots.eigenbasis_overlap({"kfac": found["conv kfac grouped_overlap"]})
        plots.why_bad({"conv": found["conv split"]})
        plots.layer_masses(study)
        plots.gram_similarity(study)
        plots.gram_over_training({0: study, 1: study})
        plots.gram_matrices(study)
        plots.coefficients(study, y.double(), mislabelled=y > 1)
        plots.dropped_over_training({0: study})
        distances = {("exact", "exact"): 0.0}
        plots.fisher_types({"exact": found["conv kfac overlap_matrix"]}, distances)
        plots.condition_against_damping([0.1, 1.0], {"kfac": found["conv condition curve"]})
        plots.mc_convergence({"conv": found["conv mc"]})
        study.arrays()


@pytest.mark.parametrize("name", [n for n in approximations.names() if n != "kbfgs"])
def test_every_power_of_every_block(name: str) -> None:
    """Thin bases, with and without eigenvalues beside them, and what is saved of a block."""
    model, x, y = problem(n=5)

    def found(captures: fl.extract.Captures) -> list[object]:
        layer = captures["conv"]
        method = approximations.get(name)()
        X, V = method(layer), layer.gradient
        values = [X.trace(), X.squared_norm(), X.diagonal(), X @ V, X.quadratic(V)]
        again = blocks.from_dict(blocks.to_dict(X))
        if name == "kronecker_sum":
            return values
        placed = PLACEMENTS if name == "kfac" else [method.placement]
        for placement in placed:
            other = dataclasses.replace(method, placement=placement) if placed[1:] else method
            values.append(other.damped(X, 0.1) @ V)
        inverse, root = again.power(-1, 0.1), X.power(0.5, 0.1)
        values += [inverse @ V, root @ V, inverse.trace(), inverse.power(1, 0.1) @ V]
        return [*values, X.logdet(0.1), X.eigenvalues().sum(), X.leading(2)[0]]

    expected = found(fl.capture(model, nn.CrossEntropyLoss(), x, y, layers=["conv"]))
    with Accelerator():
        model, x, y = there((model, x, y))
        agree(found(fl.capture(model, nn.CrossEntropyLoss(), x, y, layers=["conv"])), expected)


def test_eigenvectors_of_an_accelerator_that_are_none_are_found_again(monkeypatch) -> None:
    """Its solver says nothing of it: in float32 it fails, in float64 it is right."""
    S = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    solve = torch.linalg.eigh

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, Q = solve(matrix)
        return values, Q if Q.dtype == torch.float64 else Q + 0.1

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with Accelerator():
        values, Q = blocks.numerics.eigh(there(S))
        torch.testing.assert_close(here(Q * values @ Q.mT), S)


# --- optimizers -----------------------------------------------------------------------------------

SHORT = {"statistics_every": 2, "basis_every": 3}
OF_METHOD = {"fngd": {"coefficient_steps": 3}, "truncated_kfac": {"switch_step": 4}}


def trained(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, *at: int) -> None:
    for k in at:

        def closure(k: int = k) -> Tensor:
            a, b = x.roll(k, 0), y.roll(k, 0)
            opt.zero_grad()
            loss = F.cross_entropy(model(a), b)
            loss.backward()
            return loss

        opt.step(closure)


def made(name: str, model: nn.Module) -> torch.optim.Optimizer:
    options = OF_METHOD.get(name, {})
    try:
        return fl.optim.create(name, model, **SHORT, **options)
    except (TypeError, ValueError):  # it has no intervals
        return fl.optim.create(name, model, **options)


@pytest.mark.parametrize("name", fl.optim.names())
def test_an_optimizer_steps_and_resumes(name: str) -> None:
    """Steps with and without a refresh, and a state that was read on the CPU."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()
    _, x, y = problem()
    warnings.filterwarnings("ignore", message="FNGD's shared")
    model = copy.deepcopy(start)
    trained(model, made(name, model), x, y, 0, 1, 2, 3)
    with Accelerator():
        x, y, first = there((x, y, start))
        saved = made(name, first)
        trained(first, saved, x, y, 0, 1)
        second = there(here_model(first, start))
        resumed = made(name, second)
        resumed.load_state_dict(here(saved.state_dict()))
        trained(second, resumed, x, y, 2, 3)
        for found, expected in zip(second.parameters(), model.parameters(), strict=True):
            assert found.device.type == DEVICE.type
            agree(found.detach(), expected)


def here_model(model: nn.Module, like: nn.Module) -> nn.Module:
    """The model, on the CPU again."""
    model_here = copy.deepcopy(like)
    model_here.load_state_dict(here(model.state_dict()))
    return model_here
