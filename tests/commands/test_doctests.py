"""The examples in docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path

import fisherlab

ROOT = Path(fisherlab.__file__).parent


def test_docstring_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    wrong: list[str] = []
    for path in sorted(ROOT.rglob("*.py")):
        if ">>>" not in path.read_text(encoding="utf-8"):
            continue
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        for test in finder.find(importlib.import_module(".".join(parts))):
            runner.run(test, out=wrong.append)
    assert not runner.failures, "".join(wrong)
    assert runner.tries >= 150, "examples have gone from the docstrings"
