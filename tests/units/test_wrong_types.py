"""What a newcomer passes in the wrong form: the thing, what it was, and what to pass instead."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab import CaptureError

CRITERION = nn.CrossEntropyLoss()


def batch() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=generator), torch.arange(6) % 3
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), x, y


@pytest.mark.parametrize("call", [fl.capture, fl.compare])
def test_arrays_lists_words_and_functions(call: Callable) -> None:
    model, x, y = batch()
    with pytest.raises(CaptureError, match=r"x is no tensor but ndarray; pass torch\.as_tensor"):
        call(model, CRITERION, x.numpy(), y)
    with pytest.raises(CaptureError, match="y is no tensor but list"):
        call(model, CRITERION, x, y.tolist())
    with pytest.raises(CaptureError, match="criterion is 'ce' .str.; pass a loss"):
        call(model, "ce", x, y)
    with pytest.raises(CaptureError, match=r"float64 of shape \(6,\).*y\.long\(\)"):
        call(model, CRITERION, x, y.double())
    with pytest.raises(TypeError, match=r"the model is a torch\.nn\.Module, got function"):
        call(lambda x: x, CRITERION, x, y)


@pytest.mark.parametrize("reference", [3, torch.ones(6, 4)])
def test_reference_without_labels(reference: object) -> None:
    kind = type(reference).__name__
    message = rf"reference is \(x, y\), a loader, a Fisher type, 'ggn' or 'hessian', got {kind}"
    with pytest.raises(ValueError, match=message):
        fl.compare(*batch()[:1], CRITERION, *batch()[1:], reference=reference)


def test_support_of_what_is_no_module() -> None:
    for wrong, kind in ((5, "int"), (nn.Linear, "type")):
        with pytest.raises(TypeError, match=rf"the model is a torch\.nn\.Module, got {kind}"):
            fl.support(wrong, torch.ones(2, 4))


def test_unknown_picture() -> None:
    model, x, y = batch()
    table = fl.compare(model, CRITERION, x, y, approximations=["kfac"])
    with pytest.raises(ValueError, match="no picture of a table is named 'eror'; nearest: error"):
        table.plot("eror")


def test_a_capture_shows_itself_in_one_line() -> None:
    model, x, y = batch()
    layer = fl.capture(model, CRITERION, x, y)["0"]
    assert repr(layer) == "LayerCapture('0', Linear, 5 x 5, exact, 6 examples, torch.float32)"
