"""Data sets that come with scikit-learn: always there, offline."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from fisherlab.datasets.card import Card
from fisherlab.datasets.prepare import SPLIT, STRATIFIED, as_dataset, split
from fisherlab.datasets.registry import Dataset, register

# scikit-learn takes about a second to import, so the loaders do.

UCI = "UCI Machine Learning Repository"
CC_BY = "CC BY 4.0"
STANDARDISED = "inputs with mean 0 and deviation 1 on the training set"
WITH_TARGET = "inputs and target with mean 0 and deviation 1 on the training set"


@register(
    Card(
        name="digits",
        title="Handwritten digits, 8 x 8 pixels, 1,797 images",
        task="classification",
        num_classes=10,
        input_shape=(1, 8, 8),
        train_examples=1_442,
        source=f"E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, {UCI}, 1998; "
        "its test set as bundled with scikit-learn (load_digits)",
        licence=CC_BY,
        split=STRATIFIED,
        preparation="pixels divided by 16, in [0, 1]",
    )
)
def digits(card: Card, files: dict[str, Path]) -> Dataset:
    """Images `[n, 1, 8, 8]` in [0, 1]."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.from_numpy(raw.images).float()[:, None] / 16
    y = torch.from_numpy(raw.target).long()
    train, test = split(len(x), y)
    return Dataset(TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test]), card)


@register(
    Card(
        name="breast_cancer",
        title="Breast tumours, malignant (0) or benign (1), from 30 measurements of cell nuclei",
        task="classification",
        num_classes=2,
        input_shape=(30,),
        train_examples=456,
        source=f"W. Wolberg et al., Breast Cancer Wisconsin (Diagnostic), {UCI}, 1995; "
        "bundled with scikit-learn (load_breast_cancer)",
        licence=CC_BY,
        split=STRATIFIED,
        preparation=STANDARDISED,
    )
)
def breast_cancer(card: Card, files: dict[str, Path]) -> Dataset:
    """569 rows of 30 features."""
    from sklearn.datasets import load_breast_cancer

    return as_dataset(card, *load_breast_cancer(return_X_y=True))


@register(
    Card(
        name="diabetes",
        title="Progression of diabetes after a year, from 10 measurements of the patient",
        task="regression",
        num_classes=None,
        input_shape=(10,),
        train_examples=354,
        source="B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, Least Angle Regression, "
        "Annals of Statistics, 2004; bundled with scikit-learn (load_diabetes, unscaled)",
        licence="none stated; distributed with scikit-learn",
        split=SPLIT,
        preparation=WITH_TARGET,
    )
)
def diabetes(card: Card, files: dict[str, Path]) -> Dataset:
    """442 rows of 10 features."""
    from sklearn.datasets import load_diabetes

    # scikit-learn's own scaling has seen the rows of our test set
    return as_dataset(card, *load_diabetes(return_X_y=True, scaled=False))


@register(
    Card(
        name="iris",
        title="Three species of iris from four lengths",
        task="classification",
        num_classes=3,
        input_shape=(4,),
        train_examples=120,
        source=f"R. A. Fisher, The use of multiple measurements in taxonomic problems, 1936; {UCI};"
        " bundled with scikit-learn (load_iris)",
        licence=CC_BY,
        split=STRATIFIED,
        preparation=STANDARDISED,
    )
)
def iris(card: Card, files: dict[str, Path]) -> Dataset:
    """150 rows of 4 features."""
    from sklearn.datasets import load_iris

    return as_dataset(card, *load_iris(return_X_y=True))


@register(
    Card(
        name="wine",
        title="Three cultivars of wine from 13 chemical measurements",
        task="classification",
        num_classes=3,
        input_shape=(13,),
        train_examples=144,
        source=f"S. Aeberhard, M. Forina, Wine, {UCI}, 1992; bundled with scikit-learn (load_wine)",
        licence=CC_BY,
        split=STRATIFIED,
        preparation=STANDARDISED,
    )
)
def wine(card: Card, files: dict[str, Path]) -> Dataset:
    """178 rows of 13 features."""
    from sklearn.datasets import load_wine

    return as_dataset(card, *load_wine(return_X_y=True))


@register(
    Card(
        name="moons",
        title="Two interleaved half circles in the plane with noise, 1,000 points",
        task="classification",
        num_classes=2,
        input_shape=(2,),
        train_examples=800,
        source="generated (scikit-learn's make_moons, noise 0.2, random_state 0)",
        licence="none needed",
        split=STRATIFIED,
        preparation=STANDARDISED,
    )
)
def moons(card: Card, files: dict[str, Path]) -> Dataset:
    """1,000 points of the plane."""
    from sklearn.datasets import make_moons

    return as_dataset(card, *make_moons(1000, noise=0.2, random_state=0))
