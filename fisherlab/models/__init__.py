"""Models by name, built of layers that a capture can see: `create` and `names`."""

# Importing a module registers its models.
from fisherlab.models import own, plain, resnet, sequence
from fisherlab.models.registry import ModelError, Spec, check, create, names, register

__all__ = [
    "ModelError",
    "Spec",
    "check",
    "create",
    "names",
    "own",
    "plain",
    "register",
    "resnet",
    "sequence",
]
