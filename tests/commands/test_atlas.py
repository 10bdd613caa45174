"""The atlas: its rows against dense blocks, its command, and the page in the repository."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import fisherlab as fl
from fisherlab import cli
from fisherlab.experiments import atlas
from fisherlab.experiments.atlas import cells
from fisherlab.experiments.atlas import measure as measuring
from fisherlab.experiments.atlas import page as paging
from fisherlab.models.attention import CausalModel, Classifier

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "data" / "results" / "atlas"
CELL = cells.Cell(
    "token",
    "digits",
    lambda: Classifier(8, 8, 10, 4, "token"),
    steps=10,
    settings=(("mc", 16),),
    pooled=True,
)


@pytest.fixture(scope="module")
def rows():
    return pd.concat(atlas.measured(CELL, 3, ("kfac", "tkfac")), ignore_index=True)


def test_rows_are_of_every_stage_layer_and_method(rows):
    assert list(rows["stage"].unique()) == list(atlas.STAGES)
    assert list(rows["step"].unique()) == [0, 1, 10]
    assert set(rows["kind"]) == {"shared linear, pooled classifier", "linear, one position"}
    assert len(rows) == 3 * rows["layer"].nunique() * 2
    base = rows[rows["approximation"] == "kfac"]
    assert (base["against_kfac"] == "same").all() and (base["kfac_difference"] == 0).all()


def test_a_row_is_the_dense_error_against_pairs_of_unseen_examples(rows):
    """Errors and their difference from dense per-example blocks of the same draws."""
    x, y = CELL.batches()
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(x), generator=generator)
    unseen, rest = order[: cells.UNSEEN], order[cells.UNSEEN :]
    _, _, _, model = next(measuring.trained(CELL, 3, x[rest], y[rest], generator))
    draw, name = torch.Generator().manual_seed(3), "layer.attention.v"
    found = []
    for part in (rest[:16], unseen):
        options = {"fisher_type": "mc", "generator": draw, "kinds": ("map",)}
        found.append(fl.capture(model, torch.nn.CrossEntropyLoss(), x[part], y[part], **options))
    seen, others = (captures[name] for captures in found)
    D = torch.einsum("nto,nti->noi", others.output_gradients[0], others.inputs).flatten(1)
    K = (D @ D.T).square()
    M = len(D)
    norm = float((K.sum() - K.trace()) / (M * (M - 1)))
    squares = {}
    for method in ("kfac", "tkfac"):
        X = fl.approximations.get(method)()(seen).dense()
        squares[method] = float(X.square().sum() - 2 * ((D @ X) * D).sum() / M) + norm
    here = rows[(rows["layer"] == name) & (rows["stage"] == "start")].set_index("approximation")
    plain = (squares["tkfac"] - squares["kfac"]) / norm
    assert here["kfac_difference"]["tkfac"] == pytest.approx(plain, rel=0.1)
    assert here["kfac_difference_low"]["tkfac"] < plain < here["kfac_difference_high"]["tkfac"]
    for method, squared in squares.items():
        if not math.isnan(error := here["population_error"][method]):
            assert error == pytest.approx(math.sqrt(squared / norm), rel=0.1)


def test_a_file_is_written_once_and_grows_by_a_method(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "STAGES", {"end": 1.0})
    monkeypatch.setattr(measuring, "STAGES", {"end": 1.0})
    assert measuring.kept(tmp_path, CELL, 0, ["kfac"])
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    assert not measuring.kept(tmp_path, CELL, 0, ["kfac"]) and path.read_bytes() == before
    assert measuring.kept(tmp_path, CELL, 0, ["tkfac"])
    assert set(pd.read_parquet(path)["approximation"]) == {"kfac", "tkfac"}
    assert [p.name for p in tmp_path.iterdir()] == ["token-digits-seed0.parquet"]
    text = atlas.markdown(atlas.load(tmp_path))
    assert "| token | digits |" in text and "tkfac" in text


def test_a_file_that_holds_no_rows_is_named(tmp_path):
    path, page = tmp_path / "mlp-digits-seed0.parquet", tmp_path / "page.md"
    command = ["atlas", "--out", str(tmp_path)]

    def refused(*words):
        ended = CliRunner().invoke(cli.app, [*command, *words])
        assert ended.exit_code == 2 and not page.exists(), ended.output
        return ended.output

    path.write_bytes(b"PAR1")
    assert f"{path} is damaged" in refused("--page", str(page))
    pd.DataFrame({"other": [1]}).to_parquet(path)
    assert f"{tmp_path}: no page" in refused("--page", str(page))
    assert f"{path} holds no rows" in refused("--models", "mlp", "--seeds", "1")


def test_the_page_is_made_of_the_rows_in_the_repository(tmp_path):
    out = tmp_path / "atlas.md"
    done = CliRunner().invoke(cli.app, ["atlas", "--out", str(ROWS), "--page", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_text() == (ROOT / "docs" / "atlas.md").read_text()


def test_a_median_is_over_networks_and_its_interval_over_them_too():
    frame = pd.DataFrame(
        {
            "model": "m",
            "data": "d",
            "seed": [0, 0, 0, 1, 2],
            "kfac_difference": [-9.0, 1.0, 2.0, 3.0, 5.0],
        }
    )
    value, low, high, count = paging.median_interval(frame)
    assert (value, low, high, count) == (3.0, 1.0, 5.0, 3)
    many = pd.DataFrame({"model": "m", "data": "d", "seed": range(40)})
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        values = torch.randn(40, generator=generator).exp().tolist()
        _, low, high, _ = paging.median_interval(many.assign(kfac_difference=values))
        held += low <= 1 <= high
    assert 0.91 <= held / 200 <= 1
    assert math.isnan(paging.median_interval(frame.assign(kfac_difference=math.nan))[0])


def test_unknown_names_are_refused_with_the_nearest():
    for option, word in (("--models", "tokenn"), ("-a", "tkfacc"), ("--seeds", "x")):
        done = CliRunner().invoke(cli.app, ["atlas", option, word])
        assert done.exit_code == 2 and word in done.output, done.output
    empty = CliRunner().invoke(cli.app, ["atlas", "--out", "nowhere", "--page", "x.md"])
    assert empty.exit_code == 2 and "holds no rows" in empty.output, empty.output


def test_the_language_model_sees_no_later_word():
    torch.manual_seed(0)
    net, tokens = CausalModel(7, 6, 4).eval(), torch.randint(7, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % 7
    before, after = net(tokens), net(changed)
    assert torch.equal(before[..., :4], after[..., :4])
    assert not torch.equal(before[..., 4:], after[..., 4:])
