"""What mkdocs builds beyond the pages: equations as MathML, notebooks and API pages as they are."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import latex2mathml.converter
import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MEASURED = Path(__file__).parents[1] / "data" / "results"
RESULTS = MEASURED / "reproduce" / "minutes"
PACKAGES = {
    "comparison": "Compare approximations of every layer",
    "extract": "Capture what the passes leave at each layer",
    "blocks": "Forms of a block and what they answer",
    "statistics": "Sums over examples that approximations are made of",
    "approximations": "One definition per paper",
    "metrics": "Functions of an approximate and an exact block",
    "optim": "The same definitions as optimizers",
    "auditing": "The state of a running optimizer as blocks",
    "monitoring": "The same during a training loop, every so many steps",
    "storing": "Captures, blocks and tables on the disk",
    "adapters": "Other libraries' approximations as blocks of ours",
    "testing": "The laws as a kit, for methods of your own",
    "plots": "Tables to figures",
    "models": "Models by name",
    "datasets": "Data sets by name",
    "claims": "The papers' claims as executable checks",
}
# By subject, filled by `on_files`: the notebook's page and the picture's file.
PICTURES: dict[str, tuple[str, str]] = {}
MATH = re.compile(
    r'<(span|div) class="arithmatex">\s*\\([\(\[])(.*?)\\[\)\]]\s*</(?:span|div)>', re.DOTALL
)


def on_files(files: Files, config: Any) -> Files:
    """Add one page per notebook, with its kept pictures, and one per package."""
    PICTURES.clear()
    gallery = ["# Notebooks", "", "Each asks a question; its last cell asserts the answer."]
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        body, resources = MarkdownExporter().from_notebook_node(
            notebook, resources={"output_files_dir": f"{path.stem}_files"}
        )
        add(files, config, f"notebooks/{path.stem}.md", boost(0.5) + unindented(body))
        for name, picture in resources["outputs"].items():
            add(files, config, f"notebooks/{name}", picture)
        title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
        shown = [(drawn(notebook, name), name) for name in sorted(resources["outputs"], key=place)]
        for subject, name in shown:
            PICTURES.setdefault(re.split(r",? \(|: ", subject)[0], (f"{path.stem}.md", name))
        first = thumbnail(*shown[0], f"{path.stem}.md")
        gallery.append(f"\n## [{title}]({path.stem}.md)\n\n{first}")
    add(files, config, "notebooks/index.md", "\n".join(gallery) + "\n")
    for name in ("sngd/fig3", "fngd/fig9", "ang/fig2"):
        picture = (RESULTS / f"{name}.png").read_bytes()
        add(files, config, f"results/{name.replace('/', '_')}.png", picture)
    for name in ("influence.md", "influence.png"):
        add(files, config, f"results/{name}", (MEASURED / name).read_bytes())
    add(files, config, "glossary.md", glossary())
    add(files, config, "cli.md", command_line())
    for name, subject in PACKAGES.items():
        page = f"{boost(4)}# fisherlab.{name}\n\n{subject}.\n\n::: fisherlab.{name}\n"
        if name == "approximations":
            page += "".join(map(definition, registered()))
        add(files, config, f"api/{name}.md", page)
    return files


def boost(factor: float) -> str:
    """The head of a page that the search ranks by this factor: an item before its uses."""
    return f"---\nsearch:\n  boost: {factor}\n---\n\n"


def place(name: str) -> tuple[int, int]:
    """Cell and output that nbconvert took a picture from, which it says in the file's name."""
    cell, output = name.rsplit(".", 1)[0].split("_")[-2:]
    return int(cell), int(output)


def drawn(notebook: Any, name: str) -> str:
    """The title of a picture, which stands beside it as its text."""
    cell, output = place(name)
    return str(notebook.cells[cell].outputs[output].data["text/plain"])


def thumbnail(subject: str, picture: str, page: str) -> str:
    """A small picture that leads to the notebook that draws it."""
    alt = subject.replace("[", "(").replace("]", ")").replace("$", "").replace("\\", "")
    return f"[![{alt}]({picture}){{ width=320 loading=lazy }}]({page})"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """No contents beside a short page; below docs/pictures.md every picture a notebook has kept."""
    if len(re.findall(r"^##+ ", markdown, re.MULTILINE)) < 2 and "::: " not in markdown:
        page.meta["hide"] = ["toc"]  # the room is the tables'
    if page.file.src_uri != "pictures.md":
        return markdown
    parts = ["## Gallery", "Each picture leads to the notebook that draws it."]
    for subject, (where, picture) in sorted(PICTURES.items()):
        small = thumbnail(subject, f"notebooks/{picture}", f"notebooks/{where}")
        parts += [f"**{subject}**", small]
    return "\n\n".join([markdown, *parts, ""])


def registered() -> list[str]:
    """The full names of the approximations' classes, which the package has by name only."""
    from fisherlab import approximations

    found = map(approximations.get, approximations.names())
    return list(dict.fromkeys(f"{one.__module__}.{one.__qualname__}" for one in found))


def definition(path: str) -> str:
    """One class on a page of its package, under its own heading."""
    options = ["show_root_heading: true", "show_root_toc_entry: true", "members: false"]
    options.append("show_root_full_path: false")
    lines = [f"::: {path}", "    options:", *(f"      {option}" for option in options)]
    return "\n" + "\n".join(lines) + "\n"


def glossary() -> str:
    """The columns of a comparison, from the table that its report shows as well."""
    from fisherlab.experiments.columns import MEANING

    rows = [f"| `{name}` | {cell(meaning)} |" for name, meaning in MEANING.items()]
    head = [
        "# Glossary of columns",
        "",
        "The columns of `table.frame` and of every comparison file.",
    ]
    return "\n".join([*head, "", "| column | means |", "| --- | --- |", *rows, ""])


def command_line() -> str:
    """Every command with its arguments and options, as the program itself knows them."""
    import typer

    from fisherlab.cli import app

    parts = [
        "# Command line",
        "",
        "Every command ends with 0, 1 (a verdict), 2 (bad input) or 130.",
    ]
    root = typer.main.get_command(app)
    for name, command in sorted(commands_of(root)):
        parts += ["", f"## fisherlab {name}", "", inspect.cleandoc(command.help or "")]
        rows = [
            f"| `{' '.join((*p.opts, *p.secondary_opts))}` | {cell(getattr(p, 'help', ''))} |"
            for p in command.params
            if p.name != "help"
        ]
        if rows:
            parts += ["", "| argument or option | means |", "| --- | --- |", *rows]
    return "\n".join([*parts, ""])


def commands_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command below a group, by its full name."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from commands_of(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def cell(text: str | None) -> str:
    """A text as one cell of a table, no letter of it a sign of Markdown or HTML."""
    plain = html.escape(" ".join((text or "").split()), quote=False)
    return re.sub(r"([|*_])", r"\\\1", plain)


def add(files: Files, config: Any, where: str, content: str | bytes) -> None:
    """A file that exists only in the site."""
    files.append(File.generated(config, where, content=content))


def unindented(body: str) -> str:
    """nbconvert indents HTML outputs, which Markdown takes for code; tables stay HTML."""
    elements = r"<style.*?</style>|<div>.*?</div>|<table.*?</table>"
    return re.sub(elements, flat, body, flags=re.DOTALL)


def flat(match: re.Match[str]) -> str:
    """One HTML element without the blank lines and indents that would end or turn it into code."""
    return "".join(line.strip() + " " for line in match[0].splitlines() if line.strip())


def on_page_content(content: str, **_: Any) -> str:
    """`$...$` as MathML, which browsers render with no script."""

    def render(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return latex2mathml.converter.convert(html.unescape(match[3]), display=display)

    return MATH.sub(render, content)
