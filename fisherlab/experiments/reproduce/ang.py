"""ANG: AsymptoticNG (Tang et al. 2021): 1 table, 3 figures."""

from __future__ import annotations

from fisherlab.experiments.reproduce.drawn import blending_schedules
from fisherlab.experiments.reproduce.item import (
    Arm,
    Cell,
    Drawing,
    Experiment,
    Item,
    Number,
    Order,
    Size,
)
from fisherlab.optim.presets import inferred, stated

PAPER = "ang"
RATE = stated(0.005, "ANG 3.1")
SETTINGS = {
    "batch_size": inferred(128, "not given; table 1's seconds fit 391 steps per epoch"),
    "epochs": inferred(120, "not given; the last switch is at epoch 90"),
    "schedule": inferred("step", "ANG 3.1: milestones, not given; x 0.1 at 50 % and 75 %"),
    "augment": inferred(True, "not given; as the other papers do on CIFAR"),
    "repeats": inferred(1, "not given"),
}
_MODEL = inferred("resnet20", "ANG 3: ResNet, depth not given")
CELLS = (
    Cell(
        "cifar10",
        stated("cifar10", "ANG 3"),
        _MODEL,
        {},
        "a sixth of CIFAR-10 (9,990 training images)",
    ),
    Cell(
        "cifar100",
        stated("cifar100", "ANG 3"),
        _MODEL,
        {},
        "8,000 training images of CIFAR-100",
    ),
)
STRATEGIES = {"strategy1": "concave", "strategy2": "linear", "strategy3": "convex"}
ARMS = (
    Arm(
        "sgd",
        "sgd",
        stated(0.01, "ANG 3.1"),
        {"momentum": inferred(0.9, "not given")},
        preset="stable",
    ),
    Arm("kfac", "kfac", RATE),
    *(
        Arm(
            f"truncated{epoch}",
            "truncated_kfac",
            RATE,
            switch_epoch=stated(epoch, "ANG 3.1: epochs 30, 60, 90"),
        )
        for epoch in (30, 60, 90)
    ),
    *(
        Arm(label, "ang", RATE, {"curve": inferred(shape, "ANG fig. 2; no formula is given")})
        for label, shape in STRATEGIES.items()
    ),
    Arm("ifang", "ifang", RATE),
)
CIFAR = Experiment(
    PAPER,
    "cifar",
    CELLS,
    ARMS,
    SETTINGS,
    {
        "minutes": Size(
            epochs=6, examples=640, test_examples=200, width=0.125, seeds=2, cells=("cifar10",)
        ),
        "hours": Size(epochs=24, seeds=2, width=0.5),
        "paper": Size(seeds=3),
    },
)
_FIG1 = tuple(arm.label for arm in ARMS if arm.label != "ifang")
_CURVES = (("epoch", "accuracy"), ("epoch", "test_loss"))
_TEXT = (Order("sgd", "kfac"), Order("strategy1", "strategy2"), Order("strategy1", "strategy3"))

ITEMS = (
    Item(
        PAPER,
        "table1",
        "Seconds per epoch of K-FAC, SGD, ANG and IFANG",
        CIFAR,
        "seconds_per_epoch",
        reported={
            "cifar10": {
                "kfac": Number(56.34),
                "sgd": Number(32.72),
                "strategy1": Number(56.48),
                "ifang": Number(43.2),
            }
        },
        arms=("kfac", "sgd", "strategy1", "ifang"),
        note="Their seconds are of a GPU; the order alone is compared. Seconds of a single "
        "iteration with its inversion (4.77, 0.0144, 4.855, 0.341) are not a column.",
    ),
    Item(
        PAPER,
        "fig1",
        "Accuracy and loss of SGD, K-FAC, ANG and truncated K-FAC on CIFAR-10 and CIFAR-100",
        CIFAR,
        "accuracy",
        panels=_CURVES,
        arms=_FIG1,
        orders=_TEXT,
    ),
    Item(
        PAPER,
        "fig2",
        "Three strategies for the blend of natural gradient and SGD",
        drawing=Drawing(blending_schedules, 1.0),
        note="The paper gives no formulas; ours are exponentials of the same shapes.",
    ),
    Item(
        PAPER,
        "fig3",
        "The curves of figure 1 with IFANG",
        CIFAR,
        "accuracy",
        panels=_CURVES,
        orders=(Order("strategy1", "ifang"),),
        note="The paper's text: IFANG is slightly less impressive than ANG.",
    ),
)
