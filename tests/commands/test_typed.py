"""A user's type checker sees the package's annotations."""

import tomllib
from importlib.resources import files
from pathlib import Path


def test_the_package_that_says_typed_has_its_marker() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    said = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["classifiers"]
    assert "Typing :: Typed" in said
    assert files("fisherlab").joinpath("py.typed").is_file()
