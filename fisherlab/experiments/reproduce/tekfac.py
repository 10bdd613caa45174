"""TEKFAC: eigenvalue-corrected natural gradient (Gao et al. 2021): 5 tables, 4 figures."""

from __future__ import annotations

from fisherlab.experiments.reproduce.item import Arm, Cell, Experiment, Item, Number, Order, Size
from fisherlab.optim.presets import inferred, stated

PAPER = "tekfac"
# TEKFAC 4.1: half decades from 1e-4 to 3.
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
MIDDLE = inferred(1e-2, "the lower of the two middle values of the paper's grid")
SUBSET = "a sixth of CIFAR-10 (9,990 training images), width 16"
SUBSET_100 = "8,000 training images of CIFAR-100"

SETTINGS = {
    "batch_size": stated(128, "TEKFAC 4.1"),
    "epochs": stated(100, "TEKFAC table 3: CIFAR"),
    "schedule": stated("steps(0.4,0.8)", "TEKFAC 4.1: x 0.1 every 40 of 100 epochs"),
    "augment": stated(True, "TEKFAC 4.1: random crop and flip on CIFAR"),
    "repeats": stated(3, "TEKFAC 4.1"),
}
SVHN = {
    "epochs": stated(40, "TEKFAC table 3: SVHN"),
    "schedule": stated("steps(0.5)", "TEKFAC 4.1: x 0.1 every 20 of 40 epochs"),
    "augment": stated(False, "TEKFAC 4.1: none on SVHN"),
}
MODELS = {"vgg16": stated("vgg16", "TEKFAC 4.1"), "resnet20": stated("resnet20", "TEKFAC 4.1")}


def _cells() -> tuple[Cell, ...]:
    found = []
    for name, model in MODELS.items():
        data = inferred("mnist", "TEKFAC 4.1 has SVHN")
        stand_in = "MNIST in the place of SVHN, which is not among the data sets"
        found.append(Cell(f"svhn-{name}", data, model, SVHN, stand_in))
        data = stated("cifar10", "TEKFAC 4.1")
        found.append(Cell(f"cifar10-{name}", data, model, {}, SUBSET))
        data = stated("cifar100", "TEKFAC 4.1")
        found.append(Cell(f"cifar100-{name}", data, model, {}, SUBSET_100))
    return tuple(found)


ARMS = (
    Arm("sgdm", "sgd", MIDDLE, {"momentum": stated(0.9, "TEKFAC 4.1")}, GRID, preset="stable"),
    Arm("adam", "adam", MIDDLE, {}, GRID, preset="stable"),
    Arm("ekfac", "ekfac", MIDDLE, {}, GRID),
    Arm("tkfac", "tkfac", MIDDLE, {}, GRID),
    Arm("tekfac", "tekfac", stated(1e-3, "TEKFAC 4.2, on CIFAR-100 with ResNet-20"), {}, GRID),
)
TABLE = Experiment(
    PAPER,
    "methods",
    _cells(),
    ARMS,
    SETTINGS,
    {
        "minutes": Size(
            epochs=6,
            examples=640,
            test_examples=200,
            width=0.125,
            seeds=2,
            cells=("cifar10-resnet20",),
        ),
        "hours": Size(
            epochs=20, seeds=2, width=0.5, cells=("cifar10-resnet20", "cifar100-resnet20")
        ),
        "paper": Size(),
    },
)

_ONE = tuple(cell for cell in TABLE.cells if cell.name == "cifar100-resnet20")
_SMALL = Size(epochs=5, examples=640, test_examples=200, width=0.125, seeds=2)
_SIZES = {"minutes": _SMALL, "hours": Size(epochs=20, seeds=2, width=0.5), "paper": Size()}
VARTHETAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
VARTHETA = Experiment(
    PAPER,
    "vartheta",
    _ONE,
    tuple(
        Arm(
            f"vartheta-{value:g}",
            "tekfac",
            stated(1e-3, "TEKFAC table 4"),
            {"damping": stated(f"trace({value:g})", "TEKFAC table 4")},
        )
        for value in VARTHETAS
    ),
    SETTINGS,
    _SIZES,
)
RATES = (1e-4, 1e-3, 1e-2, 0.1)
RATE = Experiment(
    PAPER,
    "rates",
    _ONE,
    tuple(
        Arm(
            f"lr-{value:g}",
            "tekfac",
            stated(value, "TEKFAC table 5"),
            {"damping": stated("trace(0.01)", "TEKFAC 4.2")},
        )
        for value in RATES
    ),
    SETTINGS,
    _SIZES,
)

_TABLE3 = {  # TEKFAC table 3: mean and deviation of 3
    "svhn-vgg16": ((94.98, 0.09), (95.80, 0.11), (95.87, 0.13), (95.75, 0.21), (95.93, 0.16)),
    "svhn-resnet20": ((95.78, 0.15), (95.93, 0.12), (95.16, 0.07), (96.20, 0.39), (96.45, 0.14)),
    "cifar10-vgg16": ((91.19, 0.15), (92.21, 0.14), (92.67, 0.22), (92.83, 0.13), (93.35, 0.17)),
    "cifar10-resnet20": ((92.79, 0.14), (93.22, 0.18), (92.66, 0.17), (94.38, 0.04), (94.56, 0.12)),
    "cifar100-vgg16": ((67.29, 0.28), (69.47, 0.25), (70.41, 0.26), (70.82, 0.12), (71.37, 0.18)),
    "cifar100-resnet20": (
        (72.94, 0.11),
        (73.70, 0.18),
        (73.98, 0.21),
        (76.73, 0.18),
        (77.04, 0.15),
    ),
}
REPORTED = {
    cell: {arm.label: Number(*pair) for arm, pair in zip(ARMS, numbers, strict=True)}
    for cell, numbers in _TABLE3.items()
}
_TABLE4 = (
    (76.81, 0.28), (76.65, 0.12), (77.04, 0.15), (76.71, 0.17), (76.03, 0.26), (74.74, 0.11),
    (73.68, 0.09),
)  # fmt: skip
_TABLE5 = ((76.38, 0.15), (77.04, 0.15), (76.08, 0.14), (72.47, 0.23))
REPORTED_VARTHETA = {
    "cifar100-resnet20": {
        arm.label: Number(*pair) for arm, pair in zip(VARTHETA.arms, _TABLE4, strict=True)
    }
}
REPORTED_RATE = {
    "cifar100-resnet20": {
        arm.label: Number(*pair) for arm, pair in zip(RATE.arms, _TABLE5, strict=True)
    }
}

ITEMS = (
    Item(
        PAPER,
        "table1",
        "Summary of some optimizers",
        illustration=True,
        why="formulas; `fisherlab approximations` lists them with their equations",
    ),
    Item(
        PAPER,
        "table2",
        "Statistics of the data sets",
        illustration=True,
        why="sizes of data sets; `fisherlab data list` has those of ours",
    ),
    Item(
        PAPER,
        "table3",
        "Test accuracy of SGDM, Adam, EKFAC, TKFAC and TEKFAC",
        TABLE,
        "accuracy",
        reported=REPORTED,
    ),
    Item(
        PAPER,
        "table4",
        "Test accuracy over vartheta, CIFAR-100 with ResNet-20",
        VARTHETA,
        "accuracy",
        reported=REPORTED_VARTHETA,
    ),
    Item(
        PAPER,
        "table5",
        "Test accuracy over the learning rate, CIFAR-100 with ResNet-20",
        RATE,
        "accuracy",
        reported=REPORTED_RATE,
    ),
    Item(
        PAPER,
        "fig1",
        "The approximation process of KFAC, EKFAC, TKFAC and TEKFAC",
        illustration=True,
        why="a drawing; `fisherlab compare` measures what each step of it drops",
    ),
    Item(
        PAPER,
        "fig2",
        "The relations of KFAC, EKFAC, TKFAC and TEKFAC",
        illustration=True,
        why="a drawing; `fisherlab verify tekfac` checks the relations",
    ),
    Item(
        PAPER,
        "fig3",
        "Test accuracy over epochs for the five methods",
        TABLE,
        "accuracy",
        panels=(("epoch", "accuracy"),),
        reported=REPORTED,
    ),
    Item(
        PAPER,
        "fig4",
        "Test accuracy over epochs for values of vartheta",
        VARTHETA,
        "accuracy",
        panels=(("epoch", "accuracy"),),
        reported=REPORTED_VARTHETA,
        orders=tuple(Order("vartheta-0.01", f"vartheta-{value:g}") for value in (10.0, 100.0)),
        note="Fig. 4b; the final accuracies of fig. 4a are tables 4 and 5.",
    ),
)
