"""NGM: natural gradient method, perspectives and approximations (Shrestha): 1 table, 5 figures."""

from __future__ import annotations

from dataclasses import replace

from fisherlab.experiments.reproduce.item import Arm, Cell, Experiment, Item, Number, Order, Size
from fisherlab.optim.presets import As, inferred, stated

PAPER = "ngm"
# NGM 4.1 searches rates on a grid whose values it does not give.
GRID = (0.01, 0.03, 0.1, 0.3)
RATE = inferred(0.1, "the grid's values are not given; its middle in half decades around 0.1")

SETTINGS = {
    "batch_size": stated(128, "NGM fig. 2, 3, table 1"),
    "epochs": inferred(20, "not given: 'at convergence'"),
    "schedule": inferred("cosine", "NGM 4.3: a decaying learning rate, without its shape"),
    "activation": inferred("relu", "not given"),
    "repeats": inferred(3, "not given"),
}
WIDTHS = ((4,), (32, 16), (32, 16, 16))
DATA = {
    "weather": (
        stated("weather", "NGM 4.2, footnote 1"),
        "temperature from 5 features; the paper gives neither target nor features",
        20,
    ),
    "house_prices": (
        stated("house_prices", "NGM 4.2, footnote 2"),
        "the logarithm of the price; the paper's numbers point to the raw price",
        40,
    ),
    "ecoli": (stated("ecoli", "NGM 4.2, footnote 3"), "", 150),
}
# Linear least squares give logarithms of the loss of -4.60 and -1.20, near the paper's.
VARIANTS = {
    "weather_apparent": (
        inferred("weather_apparent", "NGM table 1 has losses that the 5 features cannot reach"),
        "apparent temperature from 6 features; the paper gives neither target nor features",
        20,
    ),
    "house_prices_raw": (
        inferred("house_prices_raw", "NGM table 1 has losses above those of the log price"),
        "the price itself; the paper does not say how it is scaled",
        40,
    ),
}


def _hidden(widths: tuple[int, ...]) -> As:
    return stated(widths, "NGM table 1")


def _named(data: str, widths: tuple[int, ...]) -> str:
    return f"{data}-{'x'.join(map(str, widths))}"


def _cell(data: str, widths: tuple[int, ...]) -> Cell:
    given, stand_in, epochs = {**DATA, **VARIANTS}[data]
    return Cell(
        _named(data, widths),
        given,
        stated("mlp", "NGM 4"),
        {"hidden": _hidden(widths), "epochs": inferred(epochs, "not given: 'at convergence'")},
        stand_in,
    )


SGD = Arm(
    "sgd",
    "sgd",
    RATE,
    {"momentum": inferred(0.0, "NGM 5 reserves momentum for the future")},
    GRID,
    preset="stable",
)
TENGRAD = Arm("tengrad", "tengrad", RATE, {}, GRID)

TABLE = Experiment(
    PAPER,
    "sets",
    tuple(_cell(data, widths) for widths in WIDTHS for data in DATA),
    (SGD, TENGRAD),
    SETTINGS,
    {
        "minutes": Size(epochs=5, examples=6_400, test_examples=1_000),
        "hours": Size(),
        "paper": Size(),
    },
)

OTHER_DATA = replace(
    TABLE,
    key="variants",
    cells=tuple(_cell(data, widths) for widths in WIDTHS for data in VARIANTS),
    sizes={
        **TABLE.sizes,
        "minutes": replace(
            TABLE.sizes["minutes"], cells=tuple(_named(data, (32, 16)) for data in VARIANTS)
        ),
    },
)

ALL = Experiment(
    PAPER,
    "all-methods",
    (_cell("weather", (4,)),),
    (
        SGD,
        Arm("exact_ngd", "ngd_dense", RATE, {}, GRID),
        Arm("blockwise_ngd", "blockwise_ngd", RATE, {}, GRID),
        TENGRAD,
    ),
    SETTINGS,
    {
        "minutes": Size(epochs=3, examples=6_400, test_examples=1_000),
        "hours": Size(epochs=10),
        "paper": Size(),
    },
)

# Figure 2b shows a curve per method at the best rate of the grid; here every rate is an arm.
RATES = Experiment(
    PAPER,
    "rates",
    (_cell("weather", (4,)),),
    tuple(
        Arm(
            f"{arm.label}-lr{rate:g}",
            arm.name,
            inferred(rate, "the grid's values are not given"),
            arm.options,
            preset=arm.preset,
        )
        for arm in (SGD, TENGRAD)
        for rate in GRID
    ),
    SETTINGS,
    {
        "minutes": Size(epochs=3, examples=6_400, test_examples=1_000, seeds=2),
        "hours": Size(epochs=10),
        "paper": Size(),
    },
)

DEEP = Experiment(
    PAPER,
    "deep",
    (_cell("weather", (32, 16)), _cell("weather", (32, 16, 16))),
    (SGD, TENGRAD),
    SETTINGS,
    {
        "minutes": Size(epochs=5, examples=6_400, test_examples=1_000),
        "hours": Size(),
        "paper": Size(),
    },
)

BATCHES = (16, 32, 128, 512)
BATCH = Experiment(
    PAPER,
    "batches",
    tuple(
        Cell(
            f"batch-{size}",
            DATA["weather"][0],
            stated("mlp", "NGM 4"),
            {
                "hidden": stated((32, 16), "NGM fig. 4"),
                "batch_size": inferred(size, "NGM fig. 4 varies it, values not given"),
            },
            DATA["weather"][1],
        )
        for size in BATCHES
    ),
    (SGD, TENGRAD),
    SETTINGS,
    {
        "minutes": Size(epochs=2, examples=6_400, test_examples=1_000),
        "hours": Size(epochs=10),
        "paper": Size(),
    },
)

DEPTHS = (1, 2, 4, 8)
SCALING = Experiment(
    PAPER,
    "scaling",
    tuple(
        Cell(
            f"layers-{depth}",
            DATA["weather"][0],
            stated("mlp", "NGM 4"),
            {"hidden": stated((20,) * depth, "NGM fig. 5: hidden layers of 20 nodes")},
        )
        for depth in DEPTHS
    ),
    (
        SGD,
        Arm("exact_ngd", "ngd_dense", RATE),
        Arm("blockwise_ngd", "blockwise_ngd", RATE),
        TENGRAD,
    ),
    {**SETTINGS, "epochs": inferred(1, "only seconds are read")},
    {
        "minutes": Size(examples=1_280, test_examples=100, seeds=2),
        "hours": Size(examples=6_400, test_examples=100),
        "paper": Size(examples=12_800, test_examples=100),
    },
)

_REPORTED = {  # NGM table 1: log of the training loss at convergence
    (4,): {
        "weather": (-0.45, -2.96),
        "house_prices": (-0.192, -1.120),
        "ecoli": (-1.96, -0.16),
    },
    (32, 16): {
        "weather": (-1.0, -3.68),
        "house_prices": (-0.794, -0.876),
        "ecoli": (-1.37, 0.59),
    },
    (32, 16, 16): {
        "weather": (0.24, -1.65),
        "house_prices": (-0.16, -1.06),
        "ecoli": (0.39, 0.25),
    },
}
REPORTED = {
    _named(data, widths): {"sgd": Number(sgd), "tengrad": Number(tengrad)}
    for widths, sets in _REPORTED.items()
    for data, (sgd, tengrad) in sets.items()
}

OTHERS_REPORTED = {
    _named(data, widths): REPORTED[_named(data.rpartition("_")[0], widths)]
    for widths in WIDTHS
    for data in VARIANTS
}

ITEMS = (
    Item(
        PAPER,
        "table1",
        "Log of the training loss at convergence",
        TABLE,
        "log_train_loss",
        reported=REPORTED,
        note="Natural logarithm; the paper does not give the base.",
    ),
    Item(
        PAPER,
        "table1b",
        "Log of the training loss, with the apparent temperature and the raw price",
        OTHER_DATA,
        "log_train_loss",
        reported=OTHERS_REPORTED,
        note="Table 1 on the data that its numbers point to.",
    ),
    Item(
        PAPER,
        "fig1",
        "Approximations of the Fisher matrix in natural-gradient methods",
        illustration=True,
        why="a drawing; `fisherlab compare` and its pictures measure those approximations",
    ),
    Item(
        PAPER,
        "fig2",
        "Convergence of all methods on weather, one hidden layer of 4, batch 128",
        ALL,
        "train_loss",
        panels=(("epoch", "train_loss"),),
        orders=(Order("exact_ngd", "sgd"), Order("tengrad", "sgd")),
    ),
    Item(
        PAPER,
        "fig2b",
        "Convergence over a grid of learning rates on weather, one hidden layer of 4",
        RATES,
        "train_loss",
        panels=(("epoch", "train_loss"),),
        orders=tuple(Order(f"tengrad-lr{rate:g}", f"sgd-lr{rate:g}") for rate in GRID),
    ),
    Item(
        PAPER,
        "fig3",
        "Convergence in deep and wide nets on weather, batch 128",
        DEEP,
        "train_loss",
        panels=(("epoch", "train_loss"),),
        orders=(Order("tengrad", "sgd"),),
    ),
    Item(
        PAPER,
        "fig4",
        "Impact of the batch size: [32, 16] on weather",
        BATCH,
        "train_loss",
        panels=(("epoch", "train_loss"),),
        orders=(Order("tengrad", "sgd", "batch-512"), Order("sgd", "tengrad", "batch-16")),
        note="The paper's text: faster than SGD at large batches, significantly worse at small.",
    ),
    Item(
        PAPER,
        "fig5",
        "Time over parameters, hidden layers of 20",
        SCALING,
        "seconds_per_step",
        panels=(("cell", "seconds_per_step"),),
        orders=(
            Order("tengrad", "blockwise_ngd", "layers-8"),
            Order("blockwise_ngd", "exact_ngd", "layers-8"),
        ),
        note="Left out: memory. The peak of a process hides matrices of megabytes.",
    ),
)
