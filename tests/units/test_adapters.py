"""Other libraries run on the same layers; the conventions page says what each of them does."""

import copy
import importlib
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from references import randn, relative
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherlab as fl
from fisherlab import adapters
from fisherlab.adapters import AdapterError, conventions
from fisherlab.adapters.conventions import CONVENTIONS, EQUAL, REFUSED, WRONG
from fisherlab.adapters.conventions import page as conventions_page
from fisherlab.blocks import BlockError
from fisherlab.testing import check_approximation
from fisherlab.testing.cases import captured

CE = nn.CrossEntropyLoss()
pytestmark = [
    # the libraries' own, about torch's API
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
METHODS = {"KFAC": fl.KFAC(), "EKFAC": fl.EKFAC()}


def needs(library: str):
    try:
        return importlib.import_module(library)
    except ImportError:
        return pytest.skip(f"{library} is not installed")


@contextmanager
def in_double():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def problem(layer: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A net whose first layer is of a kind."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if layer == "convolution":
            layers = [nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.Sigmoid(), nn.Flatten()]
            model, x = nn.Sequential(*layers, nn.Linear(27, 3)), randn(6, 2, 4, 4)
        else:
            layers = [nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)]
            model, x = nn.Sequential(*layers), randn(6, 3, 4)
    return model.double(), x, torch.arange(6) % 3


def through_curvlinops(method, model, x, y):
    theirs = needs("curvlinops")
    kind = theirs.EKFACLinearOperator if method == "EKFAC" else theirs.KFACLinearOperator
    operator = kind(
        model, CE, list(model.parameters()), [(x, y)],
        fisher_type=theirs.FisherType.TYPE2, separate_weight_and_bias=False,
    )  # fmt: skip
    return adapters.from_curvlinops(operator), "exact"


def through_backpack(method, model, x, y):
    needs("backpack")
    from backpack import backpack, extend
    from backpack.extensions import KFLR

    if method == "EKFAC":
        raise NotImplementedError("BackPACK has no EKFAC")
    extended, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    with backpack(KFLR()):
        loss(extended(x), y).backward()
    return adapters.from_backpack(extended, "kflr"), "exact"


def through_nngeometry(method, model, x, y):
    needs("nngeometry")
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatEKFAC, PMatKFAC

    loader = DataLoader(TensorDataset(x, y), len(x))
    kind = PMatEKFAC if method == "EKFAC" else PMatKFAC
    with in_double():
        matrix = FIM(model, loader, kind, variant="classif_logits", device="cpu")
        if method == "EKFAC":
            matrix.update_diag(loader)
    return adapters.from_nngeometry(matrix, model), "exact"


def through_kronfluence(method, model, x, y):
    needs("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classify(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    kinds = ("activation_covariance", "gradient_covariance", "eigendecomposition", "lambda")
    dtypes = {f"{kind}_dtype": torch.float64 for kind in (*kinds, "per_sample_gradient")}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "a", prepare_model(copy.deepcopy(model), Classify()), Classify(), cpu=True,
            disable_tqdm=True, disable_model_save=True, output_dir=folder, log_level=50,
        )  # fmt: skip
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True, **dtypes)
        data = TensorDataset(x, y)
        analyzer.fit_all_factors("f", data, per_device_batch_size=6, factor_args=arguments)
        if method == "EKFAC":
            return adapters.from_kronfluence(analyzer.load_all_factors("f")), "empirical"
        factors = analyzer.load_covariance_matrices("f")
        return adapters.from_kronfluence(factors, examples=len(x)), "empirical"


def bergson(module: str):
    """A module of bergson, which never imports the torchvision that transformers would look for."""
    if "transformers" not in sys.modules:
        theirs, sys.modules["torchvision"] = sys.modules.get("torchvision"), None
        try:
            needs("bergson")
        finally:
            del sys.modules["torchvision"]
            if theirs is not None:
                sys.modules["torchvision"] = theirs
    needs("bergson")
    return importlib.import_module(f"bergson.hessians.{module}")


def collected(kind, model, x, y, folder, **options):
    """A collector's files of the first layer, at the observed labels."""
    from bergson.gradients import GradientProcessor

    theirs = GradientProcessor(include_bias=True)
    options |= {"target_modules": {"0"}, "dtype": torch.float64, "path": folder}
    collector = kind(model=model, processor=theirs, **options)
    with collector.with_batch(torch.ones(x.shape[:2], dtype=torch.bool)):
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    collector.teardown()


def through_bergson(method, model, x, y):
    kfac, eigenvectors = bergson("kfac"), bergson("eigenvectors")
    positions = x[..., 0].numel()
    with tempfile.TemporaryDirectory() as folder:
        try:
            collected(kfac.CovarianceCollector, model, x, y, folder)
        except AssertionError as refusal:
            raise RuntimeError from refusal
        if method == "EKFAC":
            for side in ("activation", "gradient"):
                eigenvectors.compute_eigendecomposition(f"{folder}/{side}_sharded", positions)
            options = {"num_documents": len(x)}
            collected(eigenvectors.LambdaCollector, model, x, y, folder, **options)
            return adapters.from_bergson(folder), "empirical"
        with pytest.raises(ValueError, match="pass examples= and positions="):
            adapters.from_bergson(folder, examples=len(x))
        return adapters.from_bergson(folder, len(x), positions), "empirical"


def through_asdl(method, model, x, y):
    asdl = needs("asdl")
    if method == "EKFAC":
        raise NotImplementedError("its KFE is none")
    config = asdl.FisherConfig(
        fisher_type=asdl.FISHER_EXACT, fisher_shapes=[asdl.SHAPE_KRON],
        loss_type=asdl.LOSS_CROSS_ENTROPY, data_size=len(x),
    )  # fmt: skip
    maker = asdl.get_fisher_maker(model, config)
    maker.setup_loss_call(nn.functional.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    positions = {"0": x.shape[1]} if x.ndim == 3 else None
    return adapters.from_asdl(model, positions), "exact"


def through_fisherlab(method, model, x, y):
    found = fl.capture(model, CE, x, y)
    return {name: METHODS[method](layer) for name, layer in found.items()}, "exact"


RUN = {
    "FisherLab": through_fisherlab,
    "curvlinops": through_curvlinops,
    "BackPACK": through_backpack,
    "NNGeometry": through_nngeometry,
    "Kronfluence": through_kronfluence,
    "ASDL": through_asdl,
    "bergson": through_bergson,
}


def formula(method: str, layer) -> Tensor:
    """KFAC and EKFAC from `a` and `g`, without a block of FisherLab's."""
    a, g = layer.inputs, layer.output_gradients
    n, s, i = a.shape
    A = a.reshape(-1, i).T @ a.reshape(-1, i) / (n * s)
    B = g.flatten(0, 2).T @ g.flatten(0, 2) / n
    if method == "KFAC":
        return torch.kron(B, A)
    Q = torch.kron(torch.linalg.eigh(B)[1], torch.linalg.eigh(A)[1])
    D = torch.einsum("mnso,nsi->mnoi", g, a).flatten(2).flatten(0, 1)
    return Q @ ((D @ Q) ** 2).sum(0).diag() @ Q.T / n


@pytest.mark.peers
@pytest.mark.parametrize("row", CONVENTIONS, ids=lambda r: f"{r.library} {r.method} {r.layer}")
def test_the_table_of_conventions(row):
    model, x, y = problem(row.layer)
    if row.verdict == REFUSED:
        with pytest.raises((RuntimeError, NotImplementedError)):
            RUN[row.library](row.method, model, x, y)
        return
    blocks, fisher_type = RUN[row.library](row.method, model, x, y)
    layers = fl.capture(model, CE, x, y, fisher_type=fisher_type)
    expected = formula(row.method, layers["0"])
    if row.library == "ASDL":  # weight and bias apart
        o, i = layers["0"].shape
        bias = torch.arange(o * i) % i == i - 1
        expected = expected * (bias[:, None] == bias)
    error = relative(blocks["0"].dense(), expected)
    assert error < 1e-8 if row.verdict == EQUAL else error > 0.1
    if row.verdict == WRONG:
        a, g = layers["0"].inputs[..., :-1], layers["0"].output_gradients
        A = torch.einsum("nsi,nsj->ij", a, a) / len(a)
        B = torch.einsum("mno,mnp->op", g.sum(2), g.sum(2)) / len(a)
        assert relative(blocks["0"].parts[0].dense(), torch.kron(B, A)) < 1e-8


def test_the_page_is_what_the_table_makes():
    written = Path(__file__).parents[2] / "docs" / "conventions.md"
    assert written.read_text(encoding="utf-8") == conventions_page()
    table = conventions()
    assert set(table.library) == set(RUN)
    assert len(table) == 28 == len(table[["library", "method", "layer"]].drop_duplicates())
    assert (table.query("verdict != 'equal to 1e-8'").reason != "").all()


# curvlinops


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["full", "positions", "thin conv", "groups", "no bias"])
def test_curvlinops_on_a_capture(kind):
    needs("curvlinops")
    layer, stream = captured(kind), torch.get_rng_state()
    ours = {"kfac": fl.KFAC(), "kfac_reduce": fl.KFACReduce(), "ekfac": fl.EKFAC()}
    for method, approximation in ours.items():
        block = adapters.curvlinops(method)(layer)
        assert relative(block.dense(), approximation(layer).dense()) < 1e-10, method
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.peers
def test_curvlinops_beside_ours_in_one_table():
    needs("curvlinops")
    model, x, y = problem("convolution")
    methods = {"theirs": adapters.curvlinops("kfac"), "ours": fl.KFAC()}
    frame = fl.compare(model, CE, x, y, approximations=methods).frame
    theirs, ours = (frame.query("approximation == @name") for name in methods)
    for column in ("relative_error", "trace_ratio", "direction_cosine", "stein_loss"):
        assert theirs[column].to_numpy() == pytest.approx(ours[column].to_numpy(), rel=1e-8)
    assert theirs.relative_error.notna().all()
    check_approximation(adapters.curvlinops("kfac"), layers=("full", "positions"))
    with pytest.raises(BlockError, match="positions that do not count"):
        adapters.curvlinops("kfac")(captured("padded"))


@pytest.mark.peers
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_curvlinops_there_and_back(reduction):
    """Its operator with our factors multiplies as ours; weight and bias apart are two parts."""
    theirs = needs("curvlinops")
    model, x, y = problem("sequence")
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    layers = fl.capture(model, criterion, x, y)
    blocks = {name: fl.TKFAC()(layer) for name, layer in layers.items()}
    arguments = (model, criterion, list(model.parameters()), [(x, y)])
    options = {"fisher_type": theirs.FisherType.TYPE2}
    joint = theirs.KFACLinearOperator(*arguments, separate_weight_and_bias=False, **options)
    adapters.to_curvlinops(blocks, joint)
    again = adapters.from_curvlinops(joint)
    for name, block in blocks.items():
        assert relative(again[name].dense(), block.dense()) < 1e-12
    scale = len(x) if reduction == "sum" else 1
    v = [randn(*p.shape, seed=k) for k, p in enumerate(model.parameters())]
    product = joint @ torch.cat([part.flatten() for part in v])
    ours = blocks["0"] @ torch.cat([v[0], v[1][:, None]], 1)
    expected = scale * torch.cat([ours[:, :-1].flatten(), ours[:, -1]])
    assert relative(product[: len(expected)], expected) < 1e-12
    apart = theirs.KFACLinearOperator(*arguments, **options)
    parts = adapters.from_curvlinops(apart)["0"].parts
    B, A = formula_factors(layers["0"])
    assert relative(parts[0].dense(), torch.kron(B, A[:-1, :-1])) < 1e-10
    assert relative(parts[1].dense(), B) < 1e-10
    with pytest.raises(AdapterError, match="separate_weight_and_bias=False"):
        adapters.to_curvlinops(blocks, apart)
    with pytest.raises(AdapterError, match=r"of layers \['0'\]"):
        adapters.to_curvlinops({"0": blocks["0"]}, joint)


def formula_factors(layer) -> tuple[Tensor, Tensor]:
    a, g = layer.inputs, layer.output_gradients
    A = torch.einsum("nsi,nsj->ij", a, a) / a.shape[0] / a.shape[1]
    return torch.einsum("mnso,mnsp->op", g, g) / len(a), A


# the others


@pytest.mark.peers
def test_backpack_diagonal_is_that_of_the_block():
    needs("backpack")
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    model, x, y = problem("convolution")
    extended, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    with warnings.catch_warnings(), backpack(DiagGGNExact()):
        loss(extended(x), y).backward()
    blocks = adapters.from_backpack(extended, "diag_ggn_exact")
    for name, layer in fl.capture(model, CE, x, y).items():
        assert relative(blocks[name].diagonal(), fl.Exact()(layer).diagonal()) < 1e-10
    with pytest.raises(AdapterError, match="no parameter of this Sequential has 'kfra'"):
        adapters.from_backpack(extended, "kfra")


@pytest.mark.peers
@pytest.mark.parametrize("method", METHODS)
def test_nngeometry_there_and_back(method):
    """Its matrix with our numbers multiplies as ours."""
    needs("nngeometry")
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatEKFAC, PMatKFAC, PVector

    model, *_ = problem("convolution")
    x, y = randn(40, 2, 4, 4), torch.arange(40) % 3
    kind = {"KFAC": PMatKFAC, "EKFAC": PMatEKFAC}[method]
    approximation = {"KFAC": fl.TKFAC(), "EKFAC": fl.TEKFAC()}[method]
    ours = {name: approximation(layer) for name, layer in fl.capture(model, CE, x, y).items()}
    with in_double():
        loader = DataLoader(TensorDataset(x, y), 40)
        like = FIM(model, loader, kind, variant="classif_logits", device="cpu")
        theirs = adapters.to_nngeometry(ours, like, model)
        product = theirs.mv(PVector.from_model(model)).to_torch().detach()
    again = adapters.from_nngeometry(theirs, model)
    for name, block in ours.items():
        assert relative(again[name].dense(), block.dense()) < 1e-12
    V = torch.cat([model[0].weight.flatten(1), model[0].bias[:, None]], 1).detach()
    assert relative(product[:24], (ours["0"] @ V)[:, :-1].flatten()) < 1e-10
    if method == "EKFAC":
        few = {n: approximation(z) for n, z in fl.capture(model, CE, x[:5], y[:5]).items()}
        with pytest.raises(AdapterError, match="keeps full ones: capture more examples"):
            adapters.to_nngeometry(few, like, model)
    with pytest.raises(AdapterError, match=r"of layers \['0'\]"):
        adapters.to_nngeometry({"0": ours["0"]}, like, model)
    wrong = {name: fl.Diagonal()(layer) for name, layer in fl.capture(model, CE, x, y).items()}
    with pytest.raises(AdapterError, match="the block of layer '0' must be"):
        adapters.to_nngeometry(wrong, like, model)


def test_asdl_refuses_where_it_left_nothing():
    needs("asdl")
    with pytest.raises(AdapterError, match="no module of this Linear has Kronecker factors"):
        adapters.from_asdl(nn.Linear(2, 2))


def test_bergsons_tkfac_is_kfacs_input_factor_times_a_number():
    """Its source, 2.5.1: each batch's `sum a a^T` times the trace of the batch's `sum g g^T`."""
    layer = captured("full")
    a, g = layer.inputs[:, 0], layer.output_gradients[:, :, 0]
    theirs = a.T @ a * (g**2).sum()
    assert cosine(theirs, fl.KFAC()(layer).A) == pytest.approx(1, abs=1e-12)
    ours = torch.einsum("ni,nj,n->ij", a, a, (g**2).sum((0, 2)))
    assert cosine(ours, fl.TKFAC()(layer).A) == pytest.approx(1, abs=1e-12)
    assert cosine(theirs, ours) < 0.9999


@pytest.mark.peers
def test_bergsons_tkfac_as_it_runs_is_kfac(tmp_path):
    tkfac = bergson("tkfac")
    model, x, y = problem("sequence")
    collected(tkfac.TraceCovarianceCollector, model, x, y, tmp_path)
    theirs = adapters.from_bergson(tmp_path, len(x), x[..., 0].numel())["0"]
    layer = fl.capture(model, CE, x, y, fisher_type="empirical")["0"]
    ours = {name: method(layer) for name, method in (("KFAC", fl.KFAC()), ("TKFAC", fl.TKFAC()))}
    assert cosine(theirs.A, ours["KFAC"].A) == pytest.approx(1, abs=1e-12)
    assert cosine(theirs.G, ours["KFAC"].G) == pytest.approx(1, abs=1e-12)
    assert cosine(theirs.A, ours["TKFAC"].A) < 0.9999


def test_a_folder_without_bergsons_files_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"has no shard_\*\.safetensors"):
        adapters.from_bergson(tmp_path, 4, 4)


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / one.norm() / other.norm())


def test_ways_back_are_the_ways_there():
    layer = captured("positions")
    product, eigen = fl.KFAC()(layer), fl.EKFAC()(layer)
    (B, A), (bias,) = adapters.to_backpack(product)
    assert (
        relative(torch.kron(B, A), product.dense().view(4, 6, 4, 6)[:, :5, :, :5].reshape(20, 20))
        < 1e-12
    )
    assert relative(bias, product.dense().view(4, 6, 4, 6)[:, 5, :, 5]) < 1e-12
    one = {k: {"0": v} for k, v in adapters.to_kronfluence(product, positions=3).items()}
    assert relative(one["gradient_covariance"]["0"] * 3, product.G) < 1e-12
    again = adapters.from_kronfluence(one, examples=1)["0"].dense() * 3
    assert relative(again, product.dense()) < 1e-12
    one = {k: {"0": v} for k, v in adapters.to_kronfluence(eigen).items()}
    assert relative(adapters.from_kronfluence(one)["0"].dense(), eigen.dense()) < 1e-12
    with pytest.raises(ValueError, match="pass examples="):
        adapters.from_kronfluence({"gradient_covariance": {}})
    with pytest.raises(AdapterError, match="load_all_factors"):
        adapters.from_kronfluence({"scores": {}})


def test_a_missing_library_is_named_with_its_package(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("fisherlab.adapters.library.import_module", missing)
    with pytest.raises(AdapterError, match="pip install curvlinops-for-pytorch"):
        fl.adapters.curvlinops("kfac")
    with pytest.raises(AdapterError, match="pip install nngeometry"):
        fl.adapters.from_nngeometry(None, nn.Linear(1, 1))
    with pytest.raises(AdapterError, match="pip install backpack-for-pytorch"):
        fl.adapters.from_backpack(nn.Linear(1, 1))


def test_an_unknown_method_is_refused_with_the_known():
    with pytest.raises(ValueError, match=r"'kfak'; did you mean 'kfac'.*kfac_reduce, ekfac"):
        fl.adapters.curvlinops("kfak")
