"""Matrices over all layers at once: the whole Fisher, the whole Hessian, block-tridiagonal KFAC."""

from fisherlab.network.fisher import NetworkFisher
from fisherlab.network.hessian import NetworkHessian
from fisherlab.network.tridiagonal import Tridiagonal

__all__ = ["NetworkFisher", "NetworkHessian", "Tridiagonal"]
