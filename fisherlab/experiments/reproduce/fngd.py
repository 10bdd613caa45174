"""FNGD: inverse-free fast natural gradient descent (Ou et al.): 5 tables, 9 figures."""

from __future__ import annotations

from dataclasses import replace

from fisherlab.experiments.reproduce.drawn import gram_matrices, time_split
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
from fisherlab.optim.presets import code, inferred, stated

PAPER = "fngd"
SUBSET = "a sixth of CIFAR-10 (9,990 training images)"
SUBSET_100 = "8,000 training images of CIFAR-100"
# FNGD VI searches a grid whose values it does not give.
GRID = (0.01, 0.03, 0.1, 0.3)
RATE = code(0.1, "Eva's repository, whose schedule FNGD has; the grid is not given")
CURVATURE_RATE = inferred(0.01, "the grid is not given")
DECAY = {"weight_decay": code(5e-4, "Eva's repository; the paper gives none")}

SETTINGS = {
    "batch_size": stated(128, "FNGD VI-A"),
    "epochs": stated(100, "FNGD VI-A: second-order methods"),
    "schedule": stated("step", "FNGD VI-A: x 0.1 at 50 % and 75 %"),
    "augment": inferred(True, "not given; as Eva's repository"),
    "repeats": inferred(1, "not given"),
}
TWICE = stated(200, "FNGD VI-A: SGD-m")
CELLS = (
    Cell(
        "resnet32",
        stated("cifar10", "FNGD VI-A"),
        stated("resnet32", "FNGD VI-A"),
        {},
        SUBSET,
    ),
    Cell("vgg11", stated("cifar10", "FNGD VI-A"), stated("vgg11", "FNGD VI-A"), {}, SUBSET),
    Cell(
        "resnet18",
        stated("cifar100", "FNGD VI-A"),
        stated("resnet18", "FNGD VI-A"),
        {},
        SUBSET_100,
    ),
    Cell(
        "resnet34",
        stated("cifar100", "FNGD VI-A"),
        stated("resnet34", "FNGD VI-A"),
        {},
        SUBSET_100,
    ),
)
SGD = Arm(
    "sgdm",
    "sgd",
    RATE,
    {"momentum": stated(0.9, "FNGD VI-A"), **DECAY},
    GRID,
    epochs=TWICE,
    preset="stable",
)
EIGEN = {
    "placement": stated("eigenvalue", "FNGD VI: KFAC by eigenvalue decomposition"),
    "damping": code(0.03, "Eva's repository"),
    **DECAY,
}
KFAC = Arm("kfac", "kfac", CURVATURE_RATE, EIGEN, GRID)
FNGD = Arm("fngd", "fngd", RATE, DECAY, GRID)
ARMS = (
    SGD,
    KFAC,
    Arm("shampoo", "shampoo", RATE, DECAY, GRID),
    Arm("eva", "eva", RATE, DECAY, GRID),
    FNGD,
)
_TINY = Size(epochs=4, examples=640, test_examples=200, width=0.125, seeds=2)
CURVES = Experiment(
    PAPER,
    "curves",
    CELLS,
    ARMS,
    SETTINGS,
    {
        "minutes": replace(_TINY, cells=("resnet32", "vgg11")),
        "hours": Size(epochs=15, width=0.5, seeds=2, cells=("resnet32", "vgg11")),
        "paper": Size(),
    },
)
ABLATION = Experiment(
    PAPER,
    "ablation",
    (CELLS[0], CELLS[2]),
    (
        FNGD,
        Arm("no_sharing", "ngd_smw", RATE, DECAY, GRID),
        Arm(
            "no_damping_rule",
            "fngd",
            RATE,
            {
                "alpha": stated(None, "FNGD VI-D"),
                "damping": stated(0.3, "FNGD VI-D: a constant 0.3"),
                **DECAY,
            },
            GRID,
        ),
        Arm("control", "fngd", RATE, {"control": inferred(True, "ours"), **DECAY}, GRID),
        Arm(
            "no_acceleration",
            "fngd",
            RATE,
            {"accelerated": stated(False, "FNGD VI-D"), **DECAY},
            GRID,
            apart=True,
        ),
    ),
    SETTINGS,
    {
        "minutes": replace(_TINY, cells=("resnet32",)),
        "hours": Size(epochs=15, width=0.5, seeds=2, cells=("resnet32",)),
        "paper": Size(),
    },
)
DAMPINGS = (0.01, 0.008, 0.005, 0.003, 0.001)
DAMPING = Experiment(
    PAPER,
    "damping",
    (CELLS[2],),
    (
        *(
            Arm(f"fngd-{a:g}", "fngd", RATE, {"alpha": stated(a, "FNGD table V"), **DECAY})
            for a in DAMPINGS
        ),
        *(
            Arm(
                f"kfac-{a:g}",
                "kfac",
                CURVATURE_RATE,
                {**EIGEN, "damping": stated(a, "FNGD table V")},
            )
            for a in DAMPINGS
        ),
    ),
    SETTINGS,
    {
        "minutes": Size(epochs=1, examples=640, test_examples=200, width=0.125),
        "hours": Size(epochs=10, width=0.25, seeds=2),
        "paper": Size(),
    },
)
IMAGENET = Experiment(
    PAPER,
    "imagenet",
    (
        Cell(
            "imagenet-resnet50",
            inferred("cifar100", "FNGD fig. 7 has ImageNet"),
            stated("resnet50", "FNGD VI-A"),
            {"epochs": stated(55, "FNGD VI-A: second-order methods on ImageNet")},
            "8,000 images of CIFAR-100 in the place of ImageNet, which is not among the data sets",
        ),
    ),
    (
        Arm(
            "sgdm",
            "sgd",
            RATE,
            SGD.options,
            GRID,
            epochs=stated(90, "FNGD VI-A: SGD-m on ImageNet"),
            preset="stable",
        ),
        FNGD,
    ),
    SETTINGS,
    {
        "minutes": Size(epochs=2, examples=384, test_examples=100, width=0.125),
        "hours": Size(epochs=15, width=0.25, seeds=2),
        "paper": Size(),
    },
)
_UNKNOWN = "not given for the Transformer"
TRANSLATION = Experiment(
    PAPER,
    "multi30k",
    (
        Cell(
            "multi30k",
            stated("multi30k", "FNGD VI-B; the direction is not given: English to German"),
            stated("transformer", "FNGD VI-B: 512, 2048, 8 heads"),
            {"layers": inferred(6, "not given; 6 + 6 in the original")},
        ),
    ),
    (
        Arm(
            "sgdm",
            "sgd",
            inferred(0.1, _UNKNOWN),
            {"momentum": stated(0.9, "FNGD VI-A")},
            GRID,
            preset="stable",
        ),
        Arm(
            "adamw",
            "adamw",
            inferred(1e-3, _UNKNOWN),
            {},
            (1e-4, 3e-4, 1e-3, 3e-3),
            preset="stable",
        ),
        Arm("kfac", "kfac", CURVATURE_RATE, {"placement": EIGEN["placement"]}, GRID),
        Arm("shampoo", "shampoo", inferred(0.1, _UNKNOWN), {}, GRID),
        Arm("fngd", "fngd", inferred(0.1, _UNKNOWN), {}, GRID),
    ),
    {
        **SETTINGS,
        "batch_size": stated(64, "FNGD VI-B"),
        "schedule": inferred("constant", _UNKNOWN),
        "augment": inferred(False, "sentences"),
    },
    {
        "minutes": Size(epochs=2, examples=640, test_examples=20, width=0.125, layers=1),
        "hours": Size(epochs=10, width=0.25, layers=2),
        "paper": Size(),
    },
)

_RATIOS = {  # FNGD table III: seconds per epoch over SGD-m
    "vgg11": (1.0, 2.73, 2.09, 1.75, 1.03),
    "resnet32": (1.0, 1.52, 1.57, 1.84, 1.06),
    "resnet18": (1.0, 2.18, 1.48, 1.40, 1.03),
    "resnet34": (1.0, 2.22, 1.69, 1.26, 1.05),
}
_LABELS = ("sgdm", "kfac", "shampoo", "eva", "fngd")
RATIOS = {
    cell: {label: Number(value) for label, value in zip(_LABELS, values, strict=True)}
    for cell, values in _RATIOS.items()
}
_SECONDS = dict(zip(_LABELS, map(Number, (1677.0, 1542.0, 1706.0, 1967.0, 1131.0)), strict=True))
_ACCURACIES = {
    "fngd": (77.24, 77.09, 77.56, 77.34, 76.86),
    "kfac": (77.22, 76.96, 77.00, 76.71, 77.10),
}
ACCURACIES = {
    "resnet18": {
        f"{name}-{damping:g}": Number(value)
        for name, values in _ACCURACIES.items()
        for damping, value in zip(DAMPINGS, values, strict=True)
    }
}
_BOTH = (("epoch", "accuracy"), ("train_seconds", "accuracy"))

ITEMS = (
    Item(
        PAPER,
        "table1",
        "Complexity of different optimizers",
        illustration=True,
        why="formulas; `fisherlab verify fngd` counts the operations, `fisherlab bench scaling` "
        "fits the exponents",
    ),
    Item(
        PAPER,
        "table2",
        "Seconds to the target accuracy, ResNet-32 on CIFAR-10",
        CURVES,
        "seconds_to_target",
        reported={"resnet32": _SECONDS},
        cells=("resnet32",),
        note="Their target is 92.5 %. Here it is 0.98 of the best accuracy of the worst arm, which "
        "a subset can reach.",
    ),
    Item(
        PAPER,
        "table3",
        "Seconds per epoch over SGD-m",
        CURVES,
        "ratio_to_sgd",
        reported=RATIOS,
        note="Of the whole run: FNGD's first epoch, which collects coefficients, is in the median.",
    ),
    Item(
        PAPER,
        "table4",
        "Ablation of FNGD",
        ABLATION,
        "accuracy",
        reported={
            "resnet32": {
                "fngd": Number(93.10),
                "no_sharing": Number(92.75),
                "no_damping_rule": Number(92.63),
            },
            "resnet18": {
                "fngd": Number(77.37),
                "no_sharing": Number(77.06),
                "no_damping_rule": Number(75.51),
            },
        },
        note="'without acceleration' computes the same step; the paper gives its time alone. "
        "`control` is ours: SGD with FNGD's factor per layer.",
    ),
    Item(
        PAPER,
        "table4b",
        "Ablation of FNGD: time",
        ABLATION,
        "seconds_per_step",
        arms=("fngd", "no_sharing", "no_acceleration"),
        orders=(Order("fngd", "no_acceleration"), Order("no_acceleration", "no_sharing")),
        note="The paper: 1.0, 2.0 without sharing and 1.3 without acceleration on ResNet-32; 1.0, "
        "2.1 and 1.2 on ResNet-18.",
    ),
    Item(
        PAPER,
        "table5",
        "Test accuracy over the damping, ResNet-18 on CIFAR-100",
        DAMPING,
        "accuracy",
        reported=ACCURACIES,
    ),
    Item(
        PAPER,
        "fig1",
        "Illustration of FNGD",
        illustration=True,
        why="a drawing; `fl.plots.coefficients` shows the weights of the examples",
    ),
    Item(
        PAPER,
        "fig2",
        "Existing types of approximation",
        illustration=True,
        why="a drawing; `fisherlab approximations` has all of them",
    ),
    Item(
        PAPER,
        "fig3",
        "Correlation matrices of four layers of a ResNet-32 on CIFAR-10, batch 128",
        drawing=Drawing(gram_matrices, 60.0),
        note="The paper does not say at which point of training; here after 8 steps.",
    ),
    Item(
        PAPER,
        "fig4",
        "FNGD and NGD without sharing, ResNet-32 on CIFAR-10",
        ABLATION,
        "accuracy",
        panels=_BOTH,
        arms=("fngd", "no_sharing"),
        cells=("resnet32",),
        orders=(Order("fngd", "no_sharing"),),
    ),
    Item(
        PAPER,
        "fig5",
        "Curves of ResNet-32 and VGG-11 on CIFAR-10",
        CURVES,
        "accuracy",
        panels=_BOTH,
        cells=("resnet32", "vgg11"),
        note="The paper's text claims comparable accuracies, no order.",
    ),
    Item(
        PAPER,
        "fig6",
        "Curves of ResNet-18 and ResNet-34 on CIFAR-100",
        Experiment(
            PAPER,
            "curves-cifar100",
            CELLS[2:],
            ARMS,
            SETTINGS,
            {
                "minutes": replace(_TINY, epochs=2, seeds=1, cells=("resnet18",)),
                "hours": Size(epochs=10, width=0.25, seeds=2),
                "paper": Size(),
            },
        ),
        "accuracy",
        panels=_BOTH,
        note="The paper's text claims comparable accuracies, no order.",
    ),
    Item(
        PAPER,
        "fig7",
        "ResNet-50 on ImageNet",
        IMAGENET,
        "seconds_to_target",
        panels=_BOTH,
        orders=(Order("fngd", "sgdm"),),
        note="The paper's text: FNGD is first at 75 %, in about half of SGD's time.",
    ),
    Item(
        PAPER,
        "fig8",
        "BLEU of a Transformer on Multi30K",
        TRANSLATION,
        "bleu",
        panels=(("epoch", "bleu"), ("train_seconds", "bleu")),
        orders=tuple(Order("fngd", other) for other in ("kfac", "shampoo", "adamw", "sgdm")),
    ),
    Item(
        PAPER,
        "fig9",
        "Time split of SGD, AdamW and FNGD: forward, backward, step",
        drawing=Drawing(time_split, 40.0),
        note="FNGD's preconditioning is in its backward pass and in its step.",
    ),
)
