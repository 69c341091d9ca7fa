"""The house keeps its shape: imports point one way, light commands stay light, files stay small and are described."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "varkit"
TIERS = (
    ("devices", "errors", "files", "draws", "pictures", "hardware", "ranks"),
    ("data", "nn", "plans"),
    ("canvases",),
    ("tokenizers", "heads"),
    ("generators",),
    ("decode",),
    ("hub", "evaluate"),
    ("train", "adapt", "edit", "video", "beyond"),
    ("catalog", "bench"),
    ("cli", "serve", "studio"),
)
"""Rooms by what they may use: their own tier and those above it in this list (rooms of one tier, without a cycle)."""

TIER_OF = {room: tier for tier, rooms in enumerate(TIERS) for room in rooms}
FRONT_DOOR = ("__init__", "__main__")
"""Modules at the top that may open any room (lazily, see `test_importing_and_asking_for_help_imports_no_torch`)."""

LONGEST = 450
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room, or the module at the top, that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def tree_of(path: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST) -> str:
    """file:line of a node."""
    return f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 1)}"


def nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node`, less those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield statement
                yield from nodes_that_run(statement)
        else:
            yield from nodes_that_run(child)


def rooms_used(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Rooms that a module imports, inside functions too, or names in a table as "varkit.room.module:Name"."""
    for node in nodes_that_run(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            modules = re.findall(r"\A(varkit\.[\w.]+):\w+\Z", node.value)
        for module in modules:
            package, _, rest = module.partition(".")
            room = rest.partition(".")[0]
            if package == "varkit" and room and not room.startswith("__"):
                yield room, node


def imports() -> Iterator[tuple[str, str, str]]:
    """(room, room it uses, file:line) of the whole package."""
    for path in FILES:
        for used, node in rooms_used(tree_of(path)):
            yield room_of(path), used, place(path, node)


def test_every_room_has_a_tier():
    unknown = {room_of(path) for path in FILES} - set(TIER_OF) - set(FRONT_DOOR)
    assert not unknown, f"say in TIERS where {sorted(unknown)} stands"
    missing = {used: where for _, used, where in imports() if used not in TIER_OF}
    assert not missing, f"imported, but not rooms: {missing}"


def test_dependencies_point_one_way():
    wrong = [
        f"{where}: {room} uses {used}"
        for room, used, where in imports()
        if room not in FRONT_DOOR and TIER_OF[used] > TIER_OF[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_one_tier_do_not_use_each_other_in_a_circle():
    uses: dict[str, set[str]] = {}
    for room, used, _ in imports():
        if room not in FRONT_DOOR and room != used:
            uses.setdefault(room, set()).add(used)
    try:
        TopologicalSorter(uses).prepare()
    except CycleError as error:
        pytest.fail(f"rooms in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("import varkit.cli.main", {"cli"}),
        ("from varkit import hub, __version__", {"hub"}),
        ("def f():\n    from varkit.train.loop import train", {"train"}),
        ("import typing\nif typing.TYPE_CHECKING:\n    import varkit.serve", set()),
        ("if TYPE_CHECKING:\n    import varkit.serve\nelse:\n    import varkit.hub.config", {"hub"}),
        ("TABLE = {'a': 'varkit.edit.inpaint:inpaint'}\n'see varkit.cli.main:main there'", {"edit"}),
        ("import numpy, varkit", set()),
    ],
)
def test_imports_are_found(source: str, used: set[str]):
    assert {room for room, _ in rooms_used(ast.parse(source))} == used


def test_importing_and_asking_for_help_imports_no_torch():
    script = (
        "import sys, varkit\n"
        "assert 'torch' not in sys.modules, 'import varkit imports torch'\n"
        "from varkit.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "assert 'torch' not in sys.modules, 'varkit --help imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_files_fit_in_a_readers_head():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {str(path.relative_to(PACKAGE)): n for path, n in lengths.items() if n > LONGEST}
    assert not long, f"longer than {LONGEST} lines, split them: {long}"


def test_everything_public_says_what_it_is():
    silent = []
    for path in FILES:
        tree = tree_of(path)
        if tree.body and not ast.get_docstring(tree):
            silent.append(f"{place(path, tree)}: the file itself")
        for node in tree.body:
            kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{place(path, node)}: {node.name}")
    assert not silent, "without a docstring:\n" + "\n".join(silent)
