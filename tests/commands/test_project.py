"""Facts about the repository: what its files may name, what they pin, who may import whom."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fisherlab"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

# A module imports only from rows above it, and from its own row only what WITHIN names.
ROWS = [
    {"extras", "names"},
    {"casting", "doors", "heap", "telling", "whole"},
    {"forms"},
    {"blocks", "models", "datasets", "distributed"},
    {"metrics", "extract"},
    {"statistics"},
    {"approximations", "adapters"},
    {"comparison", "network", "optim"},
    {
        "auditing",
        "callbacks",
        "claims",
        "experiments",
        "monitoring",
        "plots",
        "storing",
        "testing",
    },
    {"cli", "commands"},
]
WITHIN = {
    ("monitoring", "auditing"),
    ("callbacks", "monitoring"),
    ("experiments", "plots"),
    ("experiments", "claims"),
    ("cli", "commands"),
}


def tracked():
    """The files of the repository, as git lists them; without git, those of the package."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        return [path for folder in (PACKAGE, ROOT / "tests") for path in folder.rglob("*.py")]
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts():
    for path in tracked():
        try:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture


def requirements():
    groups = PROJECT["optional-dependencies"].values()
    return [*PROJECT["dependencies"], *(line for group in groups for line in group)]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def module_imports(path):
    """The dotted names that a module imports, wherever in the file."""
    yield from imported(ast.parse(path.read_text(encoding="utf-8")))


def imported(tree):
    """The dotted names that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(dotted):
    """`fisherlab.blocks.outer.Outer -> blocks`; None outside the package and for its top."""
    pieces = dotted.split(".")
    return pieces[1] if pieces[0] == "fisherlab" and len(pieces) > 1 else None


# Files


def test_no_file_names_a_package_index_or_a_path_of_a_machine():
    # Put together from pieces, so that this file does not name them.
    index = "|".join(["py" + r"pi\.", "python" + r"hosted\.", r"download\.py" + "torch"])
    option = "--(extra-)?" + "index-url|--find" + "-links"
    machine = "|".join(f"/{top}/" for top in ("ro" + "ot", "ho" + "me", "wo" + "rk", "Us" + "ers"))
    pattern = re.compile(rf"(?<![\w./*])({machine})\w|{index}|{option}")
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def test_no_environment_cache_or_result_is_tracked():
    bad = re.compile(r"__pycache__|\.py[co]$|^\.venv/|^runs/|ipynb_checkpoints|\.(pkl|pickle)$")
    assert not [str(p.relative_to(ROOT)) for p in tracked() if bad.search(str(p.relative_to(ROOT)))]


def test_torchvision_is_never_imported():
    # Its CPU wheel does not load here; it is installed because BackPACK asks for it.
    for path in tracked():
        if path.suffix == ".py":
            assert not [m for m in module_imports(path) if m.split(".")[0] == "torchvision"], path


@pytest.mark.parametrize("script", ["run", "install"])
def test_scripts_are_executable_and_strict(script):
    path = ROOT / ".ci" / script
    assert path.stat().st_mode & 0o111
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


# Requirements


def test_requirements_have_lower_bounds_and_no_caps():
    for line in requirements():
        if not line.startswith("fisherlab["):
            assert re.fullmatch(r"[A-Za-z0-9._-]+>=[0-9.]+", line), line
    assert re.fullmatch(r">=3\.11", PROJECT["requires-python"])


def test_constraints_are_exact():
    for line in CONSTRAINTS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
    # Without them pip takes a torch with the CUDA packages, or one that torchvision cannot join.
    assert {"torch==2.13.0", "torchvision==0.28.0"} <= set(CONSTRAINTS)
    assert not [line for line in CONSTRAINTS if re.match("nvidia|cuda|triton", line)]


def test_the_oldest_constraints_are_the_lower_bounds():
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    pinned = [line for line in text.splitlines() if not line.startswith("#")]
    bounds = {line.replace(">=", "==") for line in requirements() if "[" not in line}
    assert pinned == sorted(bounds)
    assert len({line.split("==")[0] for line in bounds}) == len(bounds), "two bounds of a package"


def test_everything_asked_for_is_pinned():
    pinned = {normal(line.split("==")[0]) for line in CONSTRAINTS}
    extras = PROJECT["optional-dependencies"]
    peers = {normal(line.split(">=")[0]) for line in (*extras["peers"], *extras["hub"])}
    names = {normal(re.split(r"[>\[]", line)[0]) for line in requirements()}
    assert names - pinned <= {"fisherlab"} | peers


def test_third_party_imports_are_declared():
    declared = {normal(re.split(r"[>\[]", line)[0]) for line in requirements()}
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn", "backpack": "backpack-for-pytorch"}
    distributions["curvlinops"] = "curvlinops-for-pytorch"
    for path in PACKAGE.rglob("*.py"):
        for name in {dotted.split(".")[0] for dotted in module_imports(path)}:
            if name != "fisherlab" and name not in sys.stdlib_module_names:
                assert normal(distributions.get(name, name)) in declared, f"{path}: {name}"


def test_version_is_said_once():
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{PROJECT["version"]}"' in text


# Imports


def test_modules_import_only_from_rows_above():
    row_of = {name: row for row, names in enumerate(ROWS) for name in names}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here in ("__init__", "__main__"):
            continue
        assert here in row_of, f"give {here} a row"
        for dotted in module_imports(path):
            there = part(dotted)
            if there is None or there == here or (here, there) in WITHIN:
                continue
            if there.startswith("__"):
                continue  # fisherlab.__version__
            if row_of.get(there, len(ROWS)) >= row_of[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {dotted}")
    assert not wrong


def test_the_import_rule_sees_what_it_forbids(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "import fisherlab.optim.base\n"
        "from fisherlab import cli, comparison\n"
        "def late():\n    from fisherlab.approximations.kfac import KFAC\n"
    )
    parts = {part(dotted) for dotted in module_imports(module)}
    assert parts == {"optim", "cli", "comparison", "approximations"}


def module_graph():
    """The modules of the package, and the modules that each imports when it runs, late or not.

    The package itself, and imports for annotations alone, do not count.
    """
    paths = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in PACKAGE.rglob("*.py")
    }
    del paths["fisherlab"]
    graph = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        named = [m for m in imported(tree) if m.startswith("fisherlab.")]
        graph[name] = {m if m in paths else m.rpartition(".")[0] for m in named} & set(paths)
    return graph


def circles(graph):
    """The modules that import one another, or a module that does."""
    graph = {name: set(there) for name, there in graph.items()}
    while free := [name for name, there in graph.items() if not there & set(graph)]:
        for name in free:
            del graph[name]
    return graph


def test_no_modules_import_one_another():
    assert not circles(module_graph())


def test_the_search_for_circles_finds_one():
    found = circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()})
    assert set(found) == {"a", "b", "c"}


# What a start imports: seconds are noise on a busy machine, modules are not

HEAVY = (
    "backpack",
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "seaborn",
    "sklearn",
    "torch",
)


def held_after(code):
    """Which heavy packages a fresh process holds after `code`."""
    said = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    said += f"print(*sorted({{m for m in {HEAVY} if m in sys.modules}}), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stderr.split()


@pytest.mark.parametrize("words", ["--version", "--help"])
def test_the_program_answers_without_heavy_imports(words):
    call = f"from fisherlab.cli import main; sys.argv[1:] = [{words!r}]; main()"
    assert held_after(call) == []


def test_import_fisherlab_imports_nothing_until_a_name_is_used():
    assert held_after("import fisherlab as fl; dir(fl); fl.__version__") == []
    assert set(held_after("import fisherlab as fl; fl.KFAC, fl.capture, fl.optim")) <= {
        "numpy",
        "torch",
    }


def test_names_of_the_package_have_one_home():
    import fisherlab as fl

    seen = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in seen.body if isinstance(node, ast.If))
    named = {
        alias.name: node.module.removeprefix("fisherlab.").removeprefix("fisherlab")
        for node in block.body
        for alias in node.names
    }
    homes = {name: home for name, home in named.items() if name not in fl.PARTS}
    assert homes == fl.HOMES
    assert set(named) == {*fl.PARTS, *fl.HOMES}, "editors and type checkers see every name"
    assert set(fl.HOMES) <= set(fl.__all__) <= {*fl.PARTS, *fl.HOMES}
    assert all(getattr(fl, name) is not None for name in dir(fl))


# functions that make a tensor where torch.set_default_device says, unless a device is named
MAKERS = set("arange as_tensor empty eye full linspace ones rand randint randn randperm".split())
MAKERS |= {"tensor", "zeros"}
# numbers on the user's own device, in a process of the user's
ON_A_DEVICE = ("adapters", "approximations", "blocks", "comparison", "extract", "metrics")
ON_A_DEVICE += ("network", "optim")


def made_anywhere(tree):
    """The lines that make a tensor and name no device."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        of_torch = ast.unparse(call.func).partition(".")
        if of_torch[0] == "torch" and of_torch[2] in MAKERS:
            if not any(word.arg in ("device", None) for word in call.keywords):
                yield call.lineno


def test_every_tensor_is_made_on_a_named_device():
    paths = [path for part in ON_A_DEVICE for path in sorted((PACKAGE / part).rglob("*.py"))]
    found = {p: list(made_anywhere(ast.parse(p.read_text(encoding="utf-8")))) for p in paths}
    assert not {path: lines for path, lines in found.items() if lines}
    wrong = ast.parse("torch.ones(3)\ntorch.eye(2, device=d)\ntorch.relu(x)")
    assert list(made_anywhere(wrong)) == [1]
