"""Models by name, built of layers that a capture can see: `create` and `names`."""

# Importing a module registers its models.
from fisherlab.models import plain, resnet, sequence
from fisherlab.models.registry import ModelError, Spec, create, names, register

__all__ = ["ModelError", "Spec", "create", "names", "plain", "register", "resnet", "sequence"]
