"""Symmetric matrices on one layer's weight: what approximations make and metrics read."""

from fisherlab.blocks.base import Block, Dense
from fisherlab.blocks.column_sum import ColumnSum
from fisherlab.blocks.diagonal import Diagonal
from fisherlab.blocks.direct_sum import DirectSum
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.from_inverse import FromInverse
from fisherlab.blocks.kronecker import Kronecker, KroneckerSum
from fisherlab.blocks.leading import Leading
from fisherlab.blocks.mini_block import MiniBlock, RowBlocks
from fisherlab.blocks.numerics import BlockError, BlockTooLarge
from fisherlab.blocks.outer import Outer, OuterSum
from fisherlab.blocks.serialise import from_dict, to_dict

__all__ = [
    "Block",
    "BlockError",
    "BlockTooLarge",
    "ColumnSum",
    "Dense",
    "Diagonal",
    "DirectSum",
    "Eigen",
    "FromInverse",
    "Kronecker",
    "KroneckerSum",
    "Leading",
    "MiniBlock",
    "Outer",
    "OuterSum",
    "RowBlocks",
    "from_dict",
    "to_dict",
]
