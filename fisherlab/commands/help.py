"""The `--help` of a command: its docstring, its examples, its options in groups."""

from __future__ import annotations

import inspect
from typing import Any

from rich.markup import escape
from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose help fits any terminal.

    Paragraphs of the docstring lose their source's line breaks; what stands indented, an example,
    keeps them. Brackets are brackets. A flag has no type. `GROUPS` of the command's module names
    panels of options.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help = escape(flowing(self.help or ""))
        groups = getattr(inspect.getmodule(inspect.unwrap(self.callback)), "GROUPS", {})  # type: ignore[arg-type]
        panel = {name: title for title, names in groups.items() for name in names.split()}
        for option in self.params:
            option.help = escape(option.help or "")  # type: ignore[attr-defined]
            if option.name in panel:
                option.rich_help_panel = panel[option.name]  # type: ignore[attr-defined]

    def get_params(self, ctx: Any) -> list[Any]:
        """Every option and argument."""
        return typeless(super().get_params(ctx))


def typeless(params: list[Any]) -> list[Any]:
    """The options, of which a flag has no type to show."""
    for option in params:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    return params


def flowing(text: str) -> str:
    """A docstring whose paragraphs are lines; indented blocks stay as they are."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(_flowing(paragraph) for paragraph in paragraphs)


def _flowing(paragraph: str) -> str:
    lines = paragraph.split("\n")
    if any(line.startswith(" ") for line in lines):
        return paragraph
    return " ".join(lines)
