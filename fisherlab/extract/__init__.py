"""From a model and a batch to the inputs and output gradients of every layer."""

from fisherlab.extract.api import Captures, Report, capture
from fisherlab.extract.criteria import register_criterion
from fisherlab.extract.geometry import CaptureError, Geometry
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.support import support

__all__ = [
    "CaptureError",
    "Captures",
    "Geometry",
    "LayerCapture",
    "Report",
    "capture",
    "register_criterion",
    "support",
]
