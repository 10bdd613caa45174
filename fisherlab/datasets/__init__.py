"""Data sets by name: `load` reads, and never downloads; `fetch` downloads, where it may."""

# Importing a module registers its data sets.
from fisherlab.datasets import archives, bundled, images, own, tables, text
from fisherlab.datasets.card import Card, DatasetError, File
from fisherlab.datasets.download import fetch
from fisherlab.datasets.registry import Dataset, card, check, load, names, register

__all__ = [
    "Card",
    "Dataset",
    "DatasetError",
    "File",
    "archives",
    "bundled",
    "card",
    "check",
    "fetch",
    "images",
    "load",
    "names",
    "own",
    "register",
    "tables",
    "text",
]
