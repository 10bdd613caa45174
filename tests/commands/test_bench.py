"""`fisherlab bench`: rows, fair pairs, exponents of known laws, counts of known work, files."""

import json
import math
import sys
import time
from types import ModuleType

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from fisherlab.cli import app
from fisherlab.commands.bench import PARTS
from fisherlab.experiments import pages
from fisherlab.experiments.bench import (
    build,
    capture,
    compare,
    machine,
    optim,
    peers,
    record,
    scaling,
    sizes,
)
from fisherlab.experiments.bench import timing as timings
from fisherlab.experiments.bench.setting import Row, Setting, measured, title
from fisherlab.experiments.rundir import RunDir
from fisherlab.plots import bench as pictures

pytestmark = pytest.mark.usefixtures("no_pictures")

QUICK = Setting(quick=True, repeats=1, peers=False)


def spin(seconds):
    """Work of a known length, whatever else the machine does."""
    stop = time.process_time() + seconds
    while time.process_time() < stop:
        pass


def test_a_call_against_itself_reads_about_one():
    timing = timings.paired(lambda: spin(0.002), lambda: spin(0.002), repeats=15)
    assert timing.cpu_ratio == pytest.approx(1, abs=0.1)
    assert timing.spread[0] <= timing.ratio <= timing.spread[1]


def test_a_call_three_times_as_long_reads_three():
    timing = timings.paired(lambda: spin(0.006), lambda: spin(0.002), repeats=7)
    assert timing.cpu_ratio == pytest.approx(3, abs=0.4)
    assert timing.seconds >= 0.006


def test_work_and_reference_alternate_and_take_turns_to_be_first():
    order = []
    timings.paired(
        lambda: order.append("work"), lambda: order.append("ref"), repeats=4, warm_up=0, least=0
    )
    assert order[:2] == ["ref", "work"]  # the warm-up
    assert order[2:] == ["ref", "work", "work", "ref", "ref", "work", "work", "ref"]


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats is at least 1, got 0"):
        timings.paired(int, int, repeats=0)


def test_peak_growth_sees_what_was_held_only_during_the_call():
    size = 64 * 2**20
    growth = timings.peak_growth(lambda: torch.ones(size // 4).sum().item(), torch.device("cpu"))
    if growth is None:
        pytest.skip("this system does not tell a process its peak")
    assert size * 0.9 < growth < size * 2


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0])
def test_the_exponent_of_a_known_power_law(exponent):
    law = scaling.fit([1, 2, 5, 17], [3 * x**exponent for x in (1, 2, 5, 17)])
    assert law.exponent == pytest.approx(exponent)
    assert law.error == pytest.approx(0, abs=1e-7)
    assert math.exp(law.intercept) == pytest.approx(3)


def test_the_standard_error_of_a_noisy_law_is_that_of_a_regression():
    # slope 1 through logs 0, 1, 2, 3 with residuals +e, -e, -e, +e
    e = 0.1
    x = [math.exp(k) for k in range(4)]
    y = [math.exp(k + r) for k, r in enumerate((e, -e, -e, e))]
    law = scaling.fit(x, y)
    assert law.exponent == pytest.approx(1)
    assert law.error == pytest.approx(math.sqrt(4 * e**2 / 2 / 5))


@pytest.mark.parametrize("x, y", [([1], [1]), ([2, 2], [1, 2]), ([1, 2], [0, 1])])
def test_a_law_needs_two_positive_sizes(x, y):
    with pytest.raises(ValueError, match="a power law needs"):
        scaling.fit(x, y)


def test_operations_and_live_bytes_are_counted():
    a = torch.ones(50, 20)
    wide = torch.ones(30, 30, dtype=torch.float64) + torch.eye(30)

    def work():
        (a.mT @ a) @ a.mT
        wide @ wide
        torch.linalg.eigh(wide)

    count = machine.footprint(work)
    assert count.by_kind["float32"] == 2 * 50 * 20 * 20 + 2 * 20 * 20 * 50
    assert count.by_kind["float64"] == 2 * 30**3
    assert count.by_kind["decompositions"] == 9 * 30**3


def test_the_peak_is_of_what_is_alive_together():
    def work():
        one = torch.ones(1000)  # 4000 bytes
        del one
        two, three = torch.ones(1000), torch.ones(500)
        return two[:10], three

    assert machine.footprint(work).peak == 6000


def test_limits_name_the_part_that_takes_longest():
    rates = machine.Machine(1, float32=100.0, float64=50.0, decompositions=10.0, copy=10.0)
    count = machine.Footprint()
    count.by_kind = {"float32": 1e9, "float64": 1e9, "decompositions": 1e8}
    found = machine.limits(count, rates, seconds=0.1)
    assert found["limit"] == "float64 20%"
    assert found["explained"] == pytest.approx(0.4)
    assert found["gflop"] == pytest.approx(2.1)


def test_every_rate_of_the_machine_is_positive():
    rates = vars(machine.Machine.measured(torch.device("cpu"), 64))
    assert all(rate > 0 for rate in rates.values())


def test_a_peer_that_fails_is_a_row_with_the_reason():
    network = QUICK.network("mlp")

    def broken():
        raise RuntimeError("unsupported layer")

    (record,) = measured([Row("x", network, broken, by="other")], QUICK)
    assert record["note"] == "RuntimeError: unsupported layer"
    with pytest.raises(RuntimeError, match="unsupported layer"):
        list(measured([Row("x", network, broken)], QUICK))


def test_the_gradients_of_a_network_are_those_of_its_loss():
    network = QUICK.network("lenet")
    bias = network.gradients["0"][:, -1]
    loss = torch.nn.functional.cross_entropy(network.model(network.x), network.y)
    (expected,) = torch.autograd.grad(loss, network.model[0].bias)
    torch.testing.assert_close(bias, expected)


def rows_of(records):
    return {(r["network"], r["work"], r["fisher_type"]) for r in records}


@pytest.mark.slow
def test_build_has_the_rows_of_the_table():
    records = list(build.run(QUICK))
    found = rows_of(records)
    for model, methods in (("lenet", ("KFAC", "EKFAC")), ("mlp", ("KFAC", "EKFAC", "TEKFAC"))):
        for method in methods:
            for fisher_type in ("exact", "mc", "empirical"):
                assert (model, f"{method} damped inverse + product", fisher_type) in found
    assert ("lenet", "KFAC product", "exact") in found
    assert all(r["ratio"] > 0 and r["gflop"] > 0 and r["peak_bytes"] > 0 for r in records)
    # small models are no measurement of the reach
    assert all(r["reach"] is None for r in records)


def test_full_size_rows_carry_the_reach():
    full = Setting(peers=False)
    reach = {(r.network.name, r.work, r.fisher_type): r.reach for r in build.rows(full)}
    assert reach["lenet", "KFAC damped inverse + product", "exact"] == 6.5
    assert reach["lenet", "KFAC product", "mc"] == 1.9
    assert reach["mlp", "TEKFAC damped inverse + product", "empirical"] == 4.0
    lenet = next(r.network for r in build.rows(full))
    assert tuple(lenet.x.shape) == (128, 3, 32, 32)


def test_compare_says_how_far_float32_is_from_float64():
    records = list(compare.run(QUICK))
    assert records[-1]["float32_difference"] < 1e-3
    assert all(r["peak_bytes"] is None or r["peak_bytes"] >= 0 for r in records)


@pytest.mark.slow
def test_scaling_fits_every_method_and_every_axis():
    records = list(scaling.run(QUICK, scaling.AXES, ("tengrad",)))
    records += scaling.run(QUICK, scaling.AXES[:1])
    frame = pd.DataFrame(records)
    methods = {scaling.LABELS.get(m, m) for m in scaling.METHODS}
    assert set(frame["axis"]) == {axis.name for axis in scaling.AXES}
    assert set(frame[frame["axis"] == "parameters"]["method"]) == methods
    assert frame["operations_exponent"].notna().all()
    assert pictures.scaling(frame).png()[:4] == b"\x89PNG"


def test_sizes_cover_every_weight_that_has_a_block():
    setting = Setting(quick=True, repeats=1)
    first = next(sizes.run(setting))
    assert 0 < first["covered"] <= first["parameters"] and first["blocks"] == 6
    assert first["ratio"] > 0 and first["cpu_seconds"] > 0
    setting.done = {title(first)}
    (second,) = sizes.run(setting)
    assert second["network"] == "lenet" and second["covered"] == second["parameters"]


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_sizes_name_the_library_that_they_miss(library, tmp_path, monkeypatch):
    for name in ("transformers", "timm"):
        monkeypatch.setitem(sys.modules, name, None if name == library else ModuleType(name))
    result = CliRunner().invoke(app, ["bench", "sizes", "-o", str(tmp_path / "run")])
    assert result.exit_code == 2 and f"needs {library}" in result.output
    assert not (tmp_path / "run").exists()


def test_dense_operations_grow_with_the_cube_of_the_parameters_and_woodburys_linearly():
    exponents = {}
    for method, widths in (("blockwise_ngd", (24, 32, 44)), ("tengrad", (128, 256, 512))):
        axis, values, counts = scaling.AXES[0], [], []
        for size in widths:
            net = scaling.network(axis, size, QUICK)
            values.append(axis.value(net.model, size))
            counts.append(machine.footprint(scaling.work(method, net)).operations)
        exponents[method] = scaling.fit(values, counts).exponent
    assert exponents["blockwise_ngd"] == pytest.approx(3, abs=0.4)
    assert exponents["tengrad"] == pytest.approx(1, abs=0.25)


def test_optim_states_its_intervals():
    records = list(optim.run(QUICK))
    assert {"sgd (itself)", "kfac", "kfac, 32 examples"} <= {r["work"] for r in records}
    kfac = next(r for r in records if r["work"] == "kfac, 32 examples")
    assert kfac["statistics_examples"] == 32
    assert kfac["statistics_every"] == 10
    assert kfac["ratio"] > 0


@pytest.mark.peers
def test_peers_form_the_same_gram_matrices():
    network = QUICK.network("mlp")
    M = len(network.x)
    ours = sum(capture.grams(network))
    for peer, run in peers.grams(network).items():
        theirs = sum(run())  # weights and biases apart
        scale = 1 if peer == "opacus" else M**2 if peer == "BackPACK" else 1
        torch.testing.assert_close(scale * theirs, ours.to(theirs), rtol=1e-4, atol=1e-6, msg=peer)


def test_the_command_writes_a_table_json_and_a_picture(tmp_path):
    result = CliRunner().invoke(
        app, ["bench", "capture", "--quick", "--repeats", "1", "--no-peers", "-o", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "Gram matrices" in result.output and "exponents are noise" in result.output
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    assert "exponents are noise" in (tmp_path / "report.html").read_text()
    content = json.loads((tmp_path / "bench.json").read_text())
    assert "Time and memory on cpu: capture<" in (tmp_path / "report.html").read_text()
    assert set(pages.BENCH) == set(PARTS), "every part has its place on the page"
    assert content["machine"]["float32"] > 0
    assert len(content["parts"]["capture"]) == 8
    assert (tmp_path / "figures" / "capture.png").read_bytes()[:4] == b"\x89PNG"
    again = CliRunner().invoke(app, ["bench", "capture", "--quick", "-o", str(tmp_path)])
    assert again.exit_code == 2
    assert "already holds a run" in again.output
    other = ["bench", "capture", "--quick", "--resume", "-o", str(tmp_path)]
    refused = CliRunner().invoke(app, other)
    assert refused.exit_code == 2 and "other settings: peers False there" in refused.output
    # a killed run: a row that was written stays as it is, the others are measured
    table = pd.read_parquet(tmp_path / "capture.parquet")
    titles = ["network", "work", "fisher_type"]
    found = set(table[titles].itertuples(index=False, name=None))
    assert found >= {(model, "Gram matrices", "empirical") for model in ("mlp", "lenet")}
    for backend in ("hooks", "backpack"):
        assert found >= {("lenet", f"capture, {backend}", kind) for kind in ("empirical", "exact")}
    table[:6].to_parquet(tmp_path / "capture.parquet")
    resumed = CliRunner().invoke(app, [*other, "--no-peers", "--repeats", "1"])
    assert resumed.exit_code == 0, resumed.output
    after = pd.read_parquet(tmp_path / "capture.parquet")
    assert after[titles].equals(table[titles])
    assert after["seconds"][:6].equals(table["seconds"][:6])
    assert not after["seconds"][6:].equals(table["seconds"][6:])


def test_rows_that_there_is_no_time_for_are_left_and_named(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    setting = Setting()
    setting.part(until=10.0)
    assert setting.takes("first")
    now[0] = 4.0
    assert setting.takes("second")  # which may take 4 as well
    now[0] = 6.5
    assert not setting.takes("third") and setting.left == ["third"]
    setting.done = {"fourth"}
    assert not setting.takes("fourth") and setting.left == ["third"]
    setting.part(until=7.0)
    assert not setting.takes("a long one of another part", seconds=100)
    assert setting.takes("of unknown length")


def test_a_part_without_time_has_no_table_and_all_its_rows_are_named(tmp_path):
    words = ["bench", "optim", "--quick", "--no-peers", "--minutes", "1e-9", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"no time for {len(optim.RESNET_ROWS)} rows: take --resume" in said
    assert all(f"mlp: {row.title} (fisherlab)" in said for row in optim.RESNET_ROWS)
    assert not (tmp_path / "optim.parquet").exists()
    assert json.loads((tmp_path / "bench.json").read_text())["parts"] == {}


def test_every_row_is_written_as_it_is_measured(tmp_path, monkeypatch):
    folder = RunDir(tmp_path)
    seen = []

    def rows(setting):
        for k in range(3):
            seen.append(folder.table("capture"))
            about = {"network": "n", "work": str(k), "fisher_type": "", "by": "us"}
            yield {**about, "ratio": 1.0, "lowest": 1.0, "highest": 1.0, "reach": None}

    monkeypatch.setitem(record.PARTS, "capture", rows)
    record.measure("capture", QUICK, folder)
    assert seen[0] is None and [len(table) for table in seen[1:]] == [1, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["captur"], "unknown part 'captur'; did you mean 'capture'?"),
        (["build", "--device", "tpu9"], "unknown device 'tpu9'; take cpu, cuda, cuda:1 or mps"),
        (["build", "--repeats", "0"], "--repeats is at least 1, got 0"),
        (["build", "--minutes", "0"], "--minutes is a positive number, got 0"),
        (["build", "--resume"], "holds no run"),
    ],
)
def test_a_mistake_is_a_message_and_exit_code_2(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["bench", *arguments, "-o", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()
