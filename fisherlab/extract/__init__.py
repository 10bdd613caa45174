"""From a model and a batch to the inputs and output gradients of every layer."""

import fisherlab.extract.losses  # noqa: F401  makes torch's criteria known
from fisherlab.extract.api import Captures, Report, capture
from fisherlab.extract.criteria import register_criterion
from fisherlab.extract.geometry import CaptureError, Geometry
from fisherlab.extract.hessian import HessianBlock, hessian_blocks
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.products import register_product
from fisherlab.extract.support import support

__all__ = [
    "CaptureError",
    "Captures",
    "Geometry",
    "HessianBlock",
    "LayerCapture",
    "Report",
    "capture",
    "hessian_blocks",
    "register_criterion",
    "register_product",
    "support",
]
