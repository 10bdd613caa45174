"""The recorded training results say what their numbers say."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "data" / "results"


def test_the_page_on_sngds_mlp_agrees_with_its_numbers():
    found = json.loads((RESULTS / "sngd_mnist_mlp.json").read_text())
    page = (RESULTS / "sngd_mnist_mlp.md").read_text()
    final = {row["optimizer"]: row["final"] for row in found["table"]}
    assert {"sngd", "kfac", "sgd"} <= set(final)
    for row in found["table"]:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {row['optimizer']} |")]
        assert f"| {100 * row['final']:.2f} ± " in line and f"`{row['options']}`" in line
        paper = found["paper"].get(row["optimizer"])
        assert paper is None or f"| {100 * paper:.1f} |" in line
    for part in ("search", "final"):
        assert found[part]["hidden"] == [80, 80] and "784-80-80-10" in page
    order = sorted(("sngd", "kfac", "sgd"), key=lambda name: -final[name])
    assert f"here it is {', '.join(order)}." in page
