"""Data and models that a user owns: archives, folders, functions, other libraries."""

import io
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn
from typer.testing import CliRunner

from fisherlab import datasets, models
from fisherlab.cli import app
from fisherlab.datasets import DatasetError, archives
from fisherlab.experiments.training import Settings, SettingsError, entries
from fisherlab.experiments.training.task import Task
from fisherlab.models import ModelError

pytestmark = pytest.mark.usefixtures("no_pictures")


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("run",)


def archive(path, **batches):
    """A tar.gz of pickles, as CIFAR's authors made theirs."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in batches.items():
            data = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(f"cifar-x-batches-py/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def batch(n, seed, key=b"labels"):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"data": images, key: [k % 3 for k in range(n)], b"batch_label": b"x"}


# Archives ----------------------------------------------------------------------------------------


def test_cifar_is_read_from_its_archive(tmp_path):
    parts = {f"data_batch_{k}": batch(4, k) for k in (1, 2)}
    path = archive(tmp_path / "a.tar.gz", **parts, test_batch=batch(3, 9), batches_meta={b"a": []})
    x, y, x_test, y_test = archives.cifar_batches(
        path, ("data_batch_1", "data_batch_2"), "test_batch", b"labels"
    )
    wanted = np.concatenate([part[b"data"] for part in parts.values()])
    assert np.array_equal(x.reshape(8, -1), wanted) and x.shape == (8, 3, 32, 32)
    assert y.tolist() == [0, 1, 2, 0] * 2 and y_test.tolist() == [0, 1, 2]
    assert np.array_equal(x_test.reshape(3, -1), batch(3, 9)[b"data"])


def test_a_pickle_of_an_archive_runs_no_code(tmp_path, capsys):
    path = archive(tmp_path / "a.tar.gz", train={b"data": Evil()}, test=batch(1, 0))
    with pytest.raises(DatasetError, match=r"no pickle of arrays: it names __builtin__.print"):
        archives.cifar_batches(path, ("train",), "test", b"fine_labels")
    assert capsys.readouterr().out == ""
    for content in (b"", b"\x80\x02", pickle.dumps(Evil())):
        with pytest.raises(DatasetError, match="no pickle of arrays"):
            archives.unpickled(content, "x")


def test_wrong_archives_are_named(tmp_path):
    path = archive(tmp_path / "a.tar.gz", train=batch(2, 0))
    with pytest.raises(DatasetError, match="has no test"):
        archives.cifar_batches(path, ("train",), "test", b"labels")
    with pytest.raises(DatasetError, match="not CIFAR's"):
        archives.cifar_batches(path, ("train",), "train", b"fine_labels")


def test_house_numbers_call_zero_ten(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    savemat(tmp_path / "a.mat", {"X": images, "y": np.array([[1], [10], [9], [10]], np.uint8)})
    x, y = archives.house_numbers(tmp_path / "a.mat")
    assert y.tolist() == [1, 0, 9, 0] and x.shape == (4, 3, 32, 32)
    assert x[2, 1, 5, 7] == images[5, 7, 1, 2]
    (tmp_path / "b.mat").write_bytes(b"no mat" * 100)
    with pytest.raises(DatasetError, match="not SVHN"):
        archives.house_numbers(tmp_path / "b.mat")


# Folders -----------------------------------------------------------------------------------------


def images(root, part, label, count, shape=(6, 8, 3), seed=0):
    folder = root / part / label
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")


def tree(root, **options):
    for seed, (part, label, count) in enumerate(
        [("train", "cat", 3), ("train", "dog", 2), ("val", "cat", 1), ("val", "dog", 2)]
    ):
        images(root, part, label, count, seed=seed, **options)
    return root


def test_a_folder_of_images_by_class(tmp_path):
    data = datasets.load(f"folder:{tree(tmp_path)}")
    x, y = data.train.tensors
    assert x.shape == (5, 3, 6, 8) and y.tolist() == [0, 0, 0, 1, 1]
    assert data.test.tensors[1].tolist() == [0, 1, 1]
    assert data.card.num_classes == 2 and data.card.input_shape == (3, 6, 8)
    with Image.open(tmp_path / "train" / "dog" / "1.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    raw = [np.array(Image.open(p)) for p in sorted(tmp_path.glob("train/*/*.png"))]
    every = torch.from_numpy(np.stack(raw)).permute(0, 3, 1, 2).double()
    mean, sd = every.mean((0, 2, 3)), every.std((0, 2, 3), correction=0)
    wanted = (pixels - mean[:, None, None]) / sd[:, None, None]
    torch.testing.assert_close(x[4].double(), wanted, rtol=1e-5, atol=1e-5)
    scaled = datasets.load(f"folder:{tmp_path}@4")
    assert scaled.train.tensors[0].shape == (5, 3, 4, 4)


def test_gray_images_have_one_channel(tmp_path):
    assert datasets.load(f"folder:{tree(tmp_path, shape=(5, 5))}").card.input_shape == (1, 5, 5)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(DatasetError, match="no folders train and test"):
        datasets.load(f"folder:{tmp_path}")
    tree(tmp_path)
    images(tmp_path, "val", "bird", 1)
    with pytest.raises(DatasetError, match="others: bird"):
        datasets.load(f"folder:{tmp_path}")
    (tmp_path / "val" / "bird" / "0.png").unlink()
    (tmp_path / "val" / "bird").rmdir()
    with pytest.raises(DatasetError, match="after @ stands the side"):
        datasets.load(f"folder:{tmp_path}@0")
    images(tmp_path, "train", "emu", 1, shape=(7, 7, 3))
    with pytest.raises(DatasetError, match="is 7 x 7, the first image 6 x 8"):
        datasets.load(f"folder:{tmp_path}")
    (tmp_path / "train" / "emu" / "0.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="cannot be read as an image"):
        datasets.load(f"folder:{tmp_path}")


# Functions ---------------------------------------------------------------------------------------

MINE = """
import torch
from torch import nn

def data():
    x = torch.arange(40.0).reshape(10, 4)
    return x, torch.arange(10) % 3, x[:5], torch.arange(5) % 3

def numbers():
    x = torch.arange(40.0).reshape(10, 4)
    return x, x.sum(1), x, x.sum(1)

def short():
    return torch.zeros(3, 2), torch.zeros(2), torch.zeros(3, 2), torch.zeros(3)

def nothing():
    return None

def model(num_classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[-1], num_classes))
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_data_and_model_of_functions_train(mine, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = f"train --data {mine}:data --model {mine}:model --optimizer kfac,sgd --epochs 1"
    done = CliRunner().invoke(app, [*words.split(), "--batch-size", "5", "--out", str(out)])
    assert done.exit_code == 0, done.output
    monkeypatch.chdir(tmp_path)
    assert datasets.load("mine:data").card.num_classes == 3
    sys.modules.pop("mine")
    numbers = datasets.load(f"{mine}:numbers")
    assert numbers.card.task == "regression" and numbers.train.tensors[1].shape == (10, 1)
    task = Task(Settings(f"{mine}:data", f"{mine}:model", entries("sgd")))
    one, two, other = task.model(0), task.model(0), task.model(1)
    assert torch.equal(one[1].weight, two[1].weight)
    assert not torch.equal(one[1].weight, other[1].weight)


def test_wrong_functions_are_named(mine):
    for name, said in (("short", "one target per example"), ("nothing", "returns a NoneType")):
        with pytest.raises(DatasetError, match=said):
            datasets.load(f"{mine}:{name}")
    for name in (f"{mine}:none", "no_such_module:f", "none.py:f"):
        with pytest.raises(DatasetError, match=r"give module:function or file.py:function"):
            datasets.load(name)
        with pytest.raises(ModelError, match=r"give module:function or file.py:function"):
            models.create(name)
    with pytest.raises(ModelError, match="takes no width, batch_norm"):
        models.create(f"{mine}:model", width=0.5, batch_norm=True)
    with pytest.raises(ModelError, match="no torch module"):
        models.create(f"{mine}:nothing")
    for option in ({"data": "digit"}, {"model": "mlps"}):
        with pytest.raises(SettingsError, match="did you mean"):
            Settings(**option)


# Other libraries ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "library"), [("timm:resnet18", "timm"), ("hf:x", "transformers")])
def test_a_library_that_is_absent_is_named(name, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModelError, match=f"needs {library}.*fisherlab.hub"):
        models.create(name)


def test_a_model_of_another_library_gets_classes_and_size(monkeypatch):
    asked = {}

    class Timm:
        @staticmethod
        def create_model(name, **options):
            asked.update(options, name=name)
            if "img_size" in options and name == "convolutional":
                raise TypeError("img_size")
            return nn.Linear(2, 2)

    monkeypatch.setitem(sys.modules, "timm", Timm)
    models.create("timm:convolutional", num_classes=7, input_size=(1, 28, 28))
    assert asked["num_classes"] == 7 and asked["in_chans"] == 1 and not asked["pretrained"]
    models.create("timm:vit", num_classes=7, input_size=(1, 28, 28))
    assert asked["img_size"] == (28, 28)
