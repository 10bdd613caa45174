"""SNGD: reconstructing deep neural networks (Liu et al.): 5 tables, 8 figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fisherlab.experiments.reproduce.item import Arm, Cell, Experiment, Item, Number, Order, Size
from fisherlab.optim.presets import As, inferred, stated

PAPER = "sngd"
# SNGD IV-A: decades from 1e-4 to 100.
GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
SUBSET = "a sixth of CIFAR-10 (9,990 training images)"
L2 = {"weight_decay": stated(1e-3, "SNGD IV-A: L2 of 1e-3 in the loss")}
IN_LOSS = {**L2, "weight_decay_placement": stated("loss", "SNGD IV-A")}

SETTINGS = {
    "batch_size": stated(50, "SNGD table IV"),
    "epochs": stated(100, "SNGD fig. 6"),
    "schedule": inferred("constant", "not given"),
    "augment": inferred(False, "not given"),
    "repeats": inferred(3, "not given"),
}
HIDDEN = {"hidden": stated((80, 80), "SNGD IV-A: MLP with two hidden layers of 80, ReLU")}

SGDM = {"momentum": stated(0.9, "SNGD IV-A: SGD with momentum; 0.9"), **L2}
TENTH, THOUSANDTH = stated(0.1, "SNGD IV-A, images"), stated(1e-3, "SNGD IV-A, images")


def _arms(
    batch_norm: bool | None = None, tenth: As = TENTH, thousandth: As = THOUSANDTH
) -> tuple[Arm, ...]:
    """SNGD without batch norm, in whose place its local Fisher layer stands; the others with."""

    def first(name: str, lr: As, options: Mapping[str, As]) -> Arm:
        return Arm(name, name, lr, options, GRID, batch_norm=batch_norm, preset="stable")

    return (
        Arm("sngd", "sngd", tenth, {}, GRID, batch_norm=False),
        first("sgd", tenth, SGDM),
        first("adam", thousandth, L2),
        first("radam", thousandth, L2),
    )


KFAC = Arm(
    "kfac",
    "kfac",
    inferred(1e-2, "not given; the range of the code that TEKFAC names"),
    IN_LOSS,
    GRID,
    batch_norm=False,
)
MNIST = Experiment(
    PAPER,
    "mnist",
    (Cell("mnist-mlp", stated("mnist", "SNGD IV-A"), stated("mlp", "SNGD IV-A"), HIDDEN),),
    (*_arms(False), KFAC),
    SETTINGS,
    {
        "minutes": Size(epochs=3, examples=3_000, test_examples=2_000, seeds=3),
        "hours": Size(epochs=20, seeds=2),
        "paper": Size(),
    },
)

_CIFAR = stated("cifar10", "SNGD IV-A")
CIFAR = Experiment(
    PAPER,
    "cifar10",
    (
        Cell("cifar10-mlp", _CIFAR, stated("mlp", "SNGD IV-A"), HIDDEN, SUBSET),
        Cell("cifar10-vgg16", _CIFAR, stated("vgg16", "SNGD IV-A"), {}, SUBSET),
        Cell("cifar10-resnet18", _CIFAR, stated("resnet18", "SNGD IV-A"), {}, SUBSET),
    ),
    _arms(),
    SETTINGS,
    {
        "minutes": Size(epochs=2, examples=600, test_examples=500, width=0.125, seeds=2),
        "hours": Size(epochs=10, width=0.25, seeds=2),
        "paper": Size(),
    },
)

_UNKNOWN_RATE = "SNGD IV-A gives that of images; none for language"
LSTM = Experiment(
    PAPER,
    "ptb",
    tuple(
        Cell(
            f"lstm-{layers}",
            stated("ptb", "SNGD IV-A"),
            stated("lstm", "SNGD IV-A"),
            {"layers": stated(layers, "SNGD table I: 1, 2, 3 layers of 200")},
        )
        for layers in (1, 2, 3)
    ),
    _arms(None, inferred(0.1, _UNKNOWN_RATE), inferred(1e-3, _UNKNOWN_RATE)),
    {**SETTINGS, "batch_size": inferred(20, "not given for language; the usual batch")},
    {
        "minutes": Size(epochs=2, examples=400, test_examples=100, width=0.25, seeds=2),
        "hours": Size(epochs=5, width=0.5, seeds=2),
        "paper": Size(),
    },
)

CARRIED = replace(
    LSTM,
    key="ptb-carried",
    settings={**LSTM.settings, "carry": inferred(True, "not given; the usual protocol")},
    sizes={**LSTM.sizes, "minutes": replace(LSTM.sizes["minutes"], cells=("lstm-1",))},
)

NORMED = Experiment(
    PAPER,
    "batch-norm",
    (
        Cell("mnist-mlp", stated("mnist", "SNGD fig. 4"), stated("mlp", "SNGD fig. 4"), HIDDEN),
        Cell("cifar10-vgg16", _CIFAR, stated("vgg16", "SNGD fig. 4"), {}, SUBSET),
        Cell(
            "lstm-1",
            stated("ptb", "SNGD fig. 4"),
            stated("lstm", "SNGD fig. 4"),
            {"layers": inferred(1, "not given"), "batch_size": inferred(20, "the usual batch")},
        ),
    ),
    (
        Arm("sngd", "sngd", TENTH, {}, GRID, batch_norm=False),
        Arm("sgd_bn", "sgd", TENTH, SGDM, GRID, batch_norm=True, preset="stable"),
        Arm("sgd", "sgd", TENTH, SGDM, GRID, batch_norm=False, preset="stable"),
    ),
    SETTINGS,
    {
        "minutes": Size(epochs=2, examples=1_000, test_examples=500, width=0.125, seeds=2),
        "hours": Size(epochs=10, width=0.5, seeds=2),
        "paper": Size(),
    },
)  # fmt: skip

IMAGENET = Experiment(
    PAPER,
    "imagenet",
    (
        Cell(
            "imagenet-resnet18",
            inferred("cifar100", "SNGD table III has ImageNet"),
            stated("resnet18", "SNGD table III"),
            {},
            "8,000 images of CIFAR-100 in the place of ImageNet, which is not among the data sets",
        ),
    ),
    _arms(),
    SETTINGS,
    {
        "minutes": Size(epochs=2, examples=600, test_examples=500, width=0.125, seeds=2),
        "hours": Size(epochs=10, width=0.25, seeds=2),
        "paper": Size(),
    },
)

_ORDER = ("sngd", "sgd", "adam", "radam")


def _numbers(*values: float) -> dict[str, Number]:
    return {arm: Number(value) for arm, value in zip(_ORDER, values, strict=True)}


PERPLEXITY = {
    "lstm-1": _numbers(83.92, 84.21, 86.43, 88.74),
    "lstm-2": _numbers(61.58, 63.37, 61.58, 63.87),
    "lstm-3": _numbers(58.27, 61.22, 60.44, 63.32),
}
ACCURACY = {
    "cifar10-mlp": _numbers(55.57, 54.37, 53.86, 53.92),
    "cifar10-vgg16": _numbers(94.03, 92.64, 92.12, 92.16),
    "cifar10-resnet18": _numbers(94.44, 93.02, 92.93, 92.91),
}
SECONDS = {
    "cifar10-mlp": _numbers(5.35, 4.96, 5.02, 4.97),
    "cifar10-vgg16": _numbers(39.52, 38.38, 38.42, 38.38),
    "cifar10-resnet18": _numbers(53.81, 52.89, 52.94, 52.87),
}
MNIST_ACCURACY = {
    "mnist-mlp": {"sngd": Number(97.6), "kfac": Number(96.3), "sgd": Number(94.8)},
}
CURVES = (("epoch", "train_loss"), ("epoch", "accuracy"))

ITEMS = (
    Item(
        PAPER,
        "table1",
        "Perplexity of 1-, 2- and 3-layer LSTMs on Penn Treebank",
        LSTM,
        "perplexity",
        reported=PERPLEXITY,
        note="The state restarts every 35 tokens; the paper's numbers are far below plain LSTMs.",
    ),
    Item(
        PAPER,
        "table1b",
        "Perplexity of LSTMs on Penn Treebank, their state carried along the text",
        CARRIED,
        "perplexity",
        reported=PERPLEXITY,
        note="Table 1 by the usual protocol, which the paper does not mention.",
    ),
    Item(
        PAPER,
        "table2",
        "Test accuracy of MLP, VGG-16 and ResNet-18 on CIFAR-10",
        CIFAR,
        "accuracy",
        reported=ACCURACY,
    ),
    Item(
        PAPER,
        "table3",
        "Test accuracy of ResNet-18 on ImageNet",
        IMAGENET,
        "accuracy",
        reported={"imagenet-resnet18": _numbers(73.41, 70.23, 63.79, 67.62)},
        note="The paper quotes the numbers of SGD, Adam and RAdam from other papers.",
    ),
    Item(
        PAPER,
        "table4",
        "Seconds per epoch on CIFAR-10, batch 50",
        CIFAR,
        "seconds_per_epoch",
        reported=SECONDS,
        note="Their seconds are of a GPU and of all of CIFAR-10; the order alone is compared.",
    ),
    Item(
        PAPER,
        "table5",
        "Convergence time, memory and utilisation of GD, NGD and SNGD",
        why="'convergence time' is not defined, nor are the nets VGGNET34 and RESNET34/ImageNet "
        "within reach; utilisation of a GPU is not measured",
    ),
    Item(
        PAPER,
        "fig1",
        "Overview of SNGD",
        illustration=True,
        why="a drawing; `fl.optim.reconstruct` builds the network it shows",
    ),
    Item(
        PAPER,
        "fig2",
        "The restructured network",
        illustration=True,
        why="a drawing; `fl.optim.reconstruct` builds the network it shows",
    ),
    Item(
        PAPER,
        "fig3",
        "Training loss and test accuracy on MNIST: SNGD, KFAC, SGD",
        MNIST,
        "accuracy",
        panels=CURVES,
        reported=MNIST_ACCURACY,
        arms=("sngd", "kfac", "sgd"),
    ),
    Item(
        PAPER,
        "fig4",
        "Training loss: local Fisher layer, batch norm, neither",
        NORMED,
        "train_loss",
        panels=(("epoch", "train_loss"),),
        reported={
            "mnist-mlp": {"sngd": Number(0.036), "sgd_bn": Number(0.094), "sgd": Number(0.112)}
        },
        orders=tuple(
            Order(*pair, cell)
            for cell in ("cifar10-vgg16", "lstm-1")
            for pair in (("sngd", "sgd_bn"), ("sgd_bn", "sgd"))
        ),
        note="Batch norm of the LSTM is of its input map (the paper does not say where).",
    ),
    Item(
        PAPER,
        "fig5",
        "Training loss of three nets on CIFAR-10",
        CIFAR,
        "train_loss",
        panels=(("epoch", "train_loss"),),
        orders=(Order("sngd", "adam"), Order("sngd", "radam")),
        note="The paper's text: SGD and SNGD are the best two on the training set.",
    ),
    Item(
        PAPER,
        "fig6",
        "Training loss and test accuracy on MNIST, first-order methods and SNGD",
        MNIST,
        "accuracy",
        panels=CURVES,
        arms=("sngd", "sgd", "adam", "radam"),
        orders=(Order("sngd", "sgd"), Order("sngd", "adam"), Order("sngd", "radam")),
    ),
    Item(
        PAPER,
        "fig7",
        "Test perplexity over epochs on Penn Treebank",
        LSTM,
        "perplexity",
        panels=(("epoch", "perplexity"),),
        reported=PERPLEXITY,
    ),
    Item(
        PAPER,
        "fig8",
        "Test accuracy over epochs on CIFAR-10",
        CIFAR,
        "accuracy",
        panels=(("epoch", "accuracy"),),
        reported=ACCURACY,
    ),
)
