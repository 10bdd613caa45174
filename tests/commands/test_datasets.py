"""Data sets: what is loaded, that it is the same every time, and what is said when it cannot be."""

import gzip
import hashlib
import os
import shutil
import threading
from collections import Counter
from copy import copy
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fisherlab import datasets
from fisherlab.datasets import Card, Dataset, DatasetError, File, registry
from fisherlab.datasets.files import cache_folder
from fisherlab.datasets.prepare import location_and_scale, split, standardise

CARDS = Path(__file__).parents[2] / "data" / "cards"
BUNDLED = [name for name in datasets.names() if not datasets.card(name).files]
INSTALLED = [name for name in datasets.names() if datasets.card(name).files]
SIZES = {  # train, test
    "breast_cancer": (456, 113),
    "cifar10": (9_990, 9_980),
    "cifar100": (8_000, 2_000),
    "cifar100_official": (50_000, 10_000),
    "cifar10_official": (50_000, 10_000),
    "diabetes": (354, 88),
    "digits": (1_442, 355),
    "ecoli": (271, 65),
    "house_prices": (17_291, 4_322),
    "house_prices_raw": (17_291, 4_322),
    "iris": (120, 30),
    "mnist": (60_000, 10_000),
    "moons": (800, 200),
    "multi30k": (29_000, 1_000),
    "ptb": (26_559, 2_355),
    "svhn": (73_257, 26_032),
    "weather": (77_163, 19_290),
    "weather_apparent": (77_163, 19_290),
    "wine": (144, 34),
}
TEXT = ("ptb", "multi30k")
# Archives of hundreds of MB, which few have: test_own_data.py reads tiny ones.
LARGE = ("cifar10_official", "cifar100_official", "svhn")


@cache
def load(name):
    """The data set, once; a skip where it is not installed."""
    if name in INSTALLED and not os.environ.get("FISHERLAB_DATA"):
        pytest.skip("data sets not installed: set FISHERLAB_DATA")
    files = datasets.card(name).files
    if name in LARGE and not all((data_folder() / file.path).is_file() for file in files):
        pytest.skip(f"{name} is not installed")
    return datasets.load(name)


def data_folder():
    if not os.environ.get("FISHERLAB_DATA"):
        pytest.skip("data sets not installed: set FISHERLAB_DATA")
    return Path(os.environ["FISHERLAB_DATA"])


@pytest.mark.parametrize("name", datasets.names())
def test_shapes_agree_with_the_card(name):
    data = load(name)
    card = data.card
    assert (len(data.train), len(data.test)) == SIZES[name]
    assert card.train_examples == len(data.train)
    for part in (data.train, data.test):
        x, y = part.tensors
        assert x.shape[1:] == card.input_shape
        assert x.dtype == (torch.int64 if name in TEXT else torch.float32)
        assert torch.isfinite(x.float()).all()
        if card.task == "regression":
            assert y.shape == (len(x), 1) and y.dtype == torch.float32
        else:
            labels = y[y != card.ignore_index]
            assert y.dtype == torch.int64
            assert 0 <= labels.min() and labels.max() < card.num_classes == card.num_outputs
    if card.num_classes and name not in TEXT:
        assert set(data.train.tensors[1].tolist()) == set(range(card.num_classes))


def test_every_data_set_is_tried_here():
    assert set(SIZES) == set(datasets.names())


@pytest.mark.parametrize("name", [*BUNDLED, "ecoli", "house_prices"])
def test_loading_is_deterministic_and_leaves_the_random_state(name):
    load(name)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 (the global state is what must stay)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again = datasets.load(name)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002
    for part in ("train", "test"):
        for got, expected in zip(
            getattr(again, part).tensors, getattr(load(name), part).tensors, strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("name", [n for n in SIZES if n not in (*TEXT, "digits", "mnist")])
def test_scales_are_of_the_training_set(name):
    data = load(name)
    x, y = data.train.tensors
    columns = x.double().movedim(1, -1).flatten(0, -2)
    assert columns.mean(0).abs().max() < 1e-5
    # the gaps of the weather sit at the mean
    torch.testing.assert_close(
        columns.std(0, correction=0), torch.ones(x.shape[1]).double(), rtol=1e-2, atol=0
    )
    if data.card.task == "regression":
        assert abs(y.double().mean()) < 1e-6
        assert abs(y.double().std(correction=0) - 1) < 1e-6


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_images_are_in_the_unit_interval(name):
    x, _ = load(name).train.tensors
    assert (x.min(), x.max()) == (0, 1)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    x = torch.cat([part.tensors[0] for part in (load("digits").train, load("digits").test)])
    expected = torch.tensor(load_digits().data).float() / 16
    assert torch.equal(x.flatten(1).unique(dim=0), expected.unique(dim=0))


def test_mnist_labels_are_the_well_known_ones():
    data = load("mnist")
    assert data.train.tensors[1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test.tensors[1][:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(data.train.tensors[0].mean() - 0.1307) < 1e-4


def test_cifar10_leaves_out_what_is_not_exact():
    with np.load(data_folder() / "cifar10" / "cifar10_batch1_test.npz") as raw:
        pixels = raw["x_train"][raw["exact_train"]]
        last = raw["y_test"][raw["exact_test"]][-1]
    x, _ = load("cifar10").train.tensors
    expected = torch.tensor(pixels).double()
    mean, std = expected.mean((0, 2, 3)), expected.std((0, 2, 3), correction=0)
    back = x[:50].double() * std.view(3, 1, 1) + mean.view(3, 1, 1)
    torch.testing.assert_close(back, expected[:50], rtol=0, atol=1e-2)
    assert load("cifar10").test.tensors[1][-1] == last


def test_ecoli_has_the_described_classes_in_both_parts():
    labels = torch.cat([part.tensors[1] for part in (load("ecoli").train, load("ecoli").test)])
    assert torch.bincount(labels).tolist() == [143, 77, 2, 2, 35, 20, 5, 52]
    y = load("ecoli").train.tensors[1]
    assert (y[1:] != y[:-1]).sum() > 100  # not in the file's order, which is by class


def test_house_prices_in_their_own_units():
    data = load("house_prices")
    y = torch.cat([part.tensors[1] for part in (data.train, data.test)]).double()
    prices = (data.target_mean + data.target_std * y).exp()
    assert abs(prices.mean() - 540_088.14) < 10
    assert abs(prices.max() - 7_700_000) < 100


def test_weather_gaps_are_not_measurements():
    data = load("weather")
    x = torch.cat([part.tensors[0] for part in (data.train, data.test)])
    assert x[:, -1].abs().max() < 10  # a pressure of 0 would be far below
    assert (x[:, -1] == 0).sum() >= 1_288
    y = torch.cat([part.tensors[1] for part in (data.train, data.test)])
    celsius = data.target_mean + data.target_std * y.double()
    assert abs(celsius.min() + 21.82) < 0.01 and abs(celsius.max() - 39.91) < 0.01


@pytest.mark.parametrize("name, loss", [("house_prices_raw", -1.20), ("weather_apparent", -4.60)])
def test_variants_have_the_rows_of_the_sets_they_vary_and_a_target_of_their_own(name, loss):
    data, of = load(name), load(name.rpartition("_")[0])
    x, y = (tensor.double() for tensor in data.train.tensors)
    assert torch.equal(x[:, :5], of.train.tensors[0][:, :5].double())
    x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    residual = y - x @ torch.linalg.lstsq(x, y).solution
    # the logarithms of the least linear losses, measured without FisherLab
    assert residual.square().mean().log().item() == pytest.approx(loss, abs=0.01)
    y = torch.cat([part.tensors[1] for part in (data.train, data.test)]).double()
    units = data.target_mean + data.target_std * y
    wanted = {"house_prices_raw": (540_088.14, 75_000), "weather_apparent": (10.855, -27.717)}
    assert units.mean().item() == pytest.approx(wanted[name][0], rel=1e-4)
    assert units.min().item() == pytest.approx(wanted[name][1], rel=1e-4)


def test_ptb_is_one_stream():
    data = load("ptb")
    assert len(data.vocabulary) == 10_000 and data.valid is not None
    x, y = data.train.tensors
    assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
    words = gzip.open(data_folder() / "ptb" / "ptb.test.txt.gz", "rt").read()
    expected = words.replace("\n", " <eos> ").split()
    got = [data.vocabulary[token] for token in data.test.tensors[0].flatten()]
    assert got == expected[: len(got)]


def test_multi30k_pairs_source_and_target():
    data = load("multi30k")
    assert data.vocabulary[:4] == ("<pad>", "<unk>", "<bos>", "<eos>")
    assert len(data.vocabulary) == data.card.num_classes
    x, y = data.test.tensors
    source, given = x.chunk(2, 1)
    assert (given[:, 0] == 2).all()
    # y is the given target one token later, then the end, then nothing
    following = y != data.card.ignore_index
    assert torch.equal(y[:, :-1][following[:, 1:]], given[:, 1:][following[:, 1:]])
    assert torch.equal(following.sum(1), (given != 0).sum(1))
    ends = Counter(row[row != -100][-1].item() for row in y)
    assert ends[3] >= 0.99 * len(y)
    first = [data.vocabulary[token] for token in source[0] if token]
    assert first == "a man in an orange hat starring at something . <eos>".split()
    # the references keep the words that the vocabulary lacks
    assert len(data.references) == len(y) and "<unk>" not in " ".join(data.references)
    assert data.references[0] == "ein mann mit einem orangefarbenen hut , der etwas anstarrt ."


def test_nothing_of_the_test_set_is_in_the_scales():
    x = torch.cat([torch.arange(10.0)[:, None], torch.full((2, 1), 1e9)])
    scaled = standardise(x.double(), torch.arange(10))
    assert abs(scaled[:10].mean()) < 1e-6 and scaled[10:].min() > 1e8


def test_constant_columns_and_gaps_stay_finite():
    third = 1 / 3  # whose mean over many rows is not itself
    x = torch.tensor([[third, 1.0], [third, float("nan")], [third, 3.0]] * 100).double()
    mean, std = location_and_scale(x)
    assert std[0] == 1 and mean[1] == 2
    scaled = standardise(x, torch.arange(300))
    assert torch.isfinite(scaled).all() and scaled[:, 0].abs().max() < 1e-6
    assert not scaled[1::3, 1].any()


def test_splits_cover_and_do_not_overlap():
    for labels in (None, torch.arange(103) % 5):
        train, test = split(103, labels)
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(103))
        assert train.tolist() != sorted(train.tolist())
    assert len(split(2, torch.zeros(2))[0]) == 2


# Cards


@pytest.mark.parametrize("name", datasets.names())
def test_cards_agree_with_the_code(name):
    page = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert page == datasets.card(name).markdown(), (
        f"write datasets.card({name!r}).markdown() to data/cards/{name}.md"
    )


def test_there_is_a_card_for_every_data_set():
    assert sorted(path.stem for path in CARDS.glob("*.md")) == datasets.names()


# Bad input


def test_unknown_names_get_the_nearest():
    with pytest.raises(DatasetError, match="'digit'; did you mean 'digits'"):
        datasets.load("digit")
    with pytest.raises(ValueError, match=r"'zzz'\. Known: breast_cancer, cifar10"):
        datasets.load("zzz")


def test_missing_files_name_folder_variable_and_command(tmp_path, monkeypatch):
    for root, folder in ((tmp_path, tmp_path), (None, cache_folder())):
        monkeypatch.delenv("FISHERLAB_DATA", raising=False)
        if root is None and (folder / "ecoli").exists():
            continue
        with pytest.raises(DatasetError) as raised:
            datasets.load("ecoli", root=root)
        for part in (str(folder), "FISHERLAB_DATA", "fisherlab data fetch ecoli", "ecoli.data"):
            assert part in str(raised.value)


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="no such folder.*nowhere.*from root"):
        datasets.load("mnist", root=tmp_path / "nowhere")
    monkeypatch.setenv("FISHERLAB_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DatasetError, match="elsewhere.*from FISHERLAB_DATA"):
        datasets.load("mnist")
    datasets.load("iris")  # bundled: looks nowhere


# Files and downloads, on a toy data set of one file


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A registered data set of one file, served on this machine: its server's folder and name."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "numbers.txt").write_text("1 2 3 4")
    handler = partial(QuietHandler, directory=served)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(registry, "_REGISTRY", copy(registry._REGISTRY))

    def register(name, url):
        file = File(f"{name}/numbers.txt", hashlib.sha256(b"1 2 3 4").hexdigest(), url)
        card = Card(
            name, "", "regression", None, (1,), "", "", "", files=(file,), obtain="Ask the author"
        )

        @datasets.register(card)
        def load(card, files):
            x = torch.tensor([float(w) for w in files[file.path].read_text().split()])[:, None]
            return Dataset(TensorDataset(x, x), TensorDataset(x, x), card)

    register("toy", f"http://127.0.0.1:{server.server_port}/numbers.txt")
    register("private", None)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without writing to the terminal."""

    def log_message(self, format, *args):
        """Nothing."""


@pytest.mark.parametrize("progress", [True, False])
def test_fetch_then_load(toy, tmp_path, progress):
    root = tmp_path / "data"
    root.mkdir()
    (path,) = datasets.fetch("toy", root=root, progress=progress)
    assert path == root / "toy" / "numbers.txt"
    assert datasets.load("toy", root=root).train.tensors[0].flatten().tolist() == [1, 2, 3, 4]
    (toy / "numbers.txt").unlink()
    assert datasets.fetch("toy", root=root, progress=progress) == [path]  # there already


def test_load_never_downloads(toy, tmp_path):
    with pytest.raises(DatasetError, match="fisherlab data fetch toy"):
        datasets.load("toy", root=tmp_path)


@pytest.mark.parametrize("damage", [b"1 2 3", b"1 2 3 5", b""])
def test_a_corrupt_or_truncated_file_is_named_and_fetched_again(toy, tmp_path, damage):
    (path,) = datasets.fetch("toy", root=tmp_path, progress=False)
    path.write_bytes(damage)
    with pytest.raises(DatasetError) as raised:
        datasets.load("toy", root=tmp_path)
    got, expected = hashlib.sha256(damage).hexdigest(), hashlib.sha256(b"1 2 3 4").hexdigest()
    for part in (str(path), got, expected, "fisherlab data fetch toy"):
        assert part in str(raised.value)
    datasets.fetch("toy", root=tmp_path, progress=False)
    datasets.load("toy", root=tmp_path)


def test_wrong_bytes_from_the_server_are_not_kept(toy, tmp_path):
    (toy / "numbers.txt").write_text("other bytes")
    with pytest.raises(DatasetError, match=r"did not serve toy/numbers.txt.*nothing was kept"):
        datasets.fetch("toy", root=tmp_path, progress=False)
    assert not list((tmp_path / "toy").iterdir())


def test_a_failed_download_names_the_address(toy, tmp_path):
    (toy / "numbers.txt").unlink()
    with pytest.raises(DatasetError, match=r"could not download http.*numbers.txt.*404"):
        datasets.fetch("toy", root=tmp_path, progress=False)


def test_fetch_refuses_what_no_address_serves(toy, tmp_path):
    with pytest.raises(DatasetError, match=r"'private' cannot be fetched.*Ask the author"):
        datasets.fetch("private", root=tmp_path)
    for name in ("ecoli", "cifar10", "ptb", "weather", "house_prices", "cifar100"):
        with pytest.raises(DatasetError, match=f"'{name}' cannot be fetched"):
            datasets.fetch(name, root=tmp_path)
    assert datasets.fetch("digits") == []
    with pytest.raises(DatasetError, match="did you mean 'mnist'"):
        datasets.fetch("mnits")


def test_a_truncated_real_file_is_refused(tmp_path):
    shutil.copytree(data_folder() / "ecoli", tmp_path / "ecoli", copy_function=shutil.copyfile)
    (tmp_path / "ecoli").chmod(0o755)
    path = tmp_path / "ecoli" / "ecoli.data"
    assert len(datasets.load("ecoli", root=tmp_path).train) == SIZES["ecoli"][0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"ecoli.data is corrupt or truncated \(19,316 bytes\)"):
        datasets.load("ecoli", root=tmp_path)
