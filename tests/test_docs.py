"""The pages in docs/ tell the truth: what they name exists, what they show runs, and so do the examples."""

import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.contracts import CASES, start, true_latents
from tests.test_contracts import filled, force
from varkit.cli.arguments import parse
from varkit.cli.main import COMMANDS
from varkit.errors import UserError
from varkit.hub.pipeline import bundled
from varkit.nn.attention import Packed
from varkit.plans.join import pack
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.kl import KLConfig
from varkit.train.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

FOLDERS = ("varkit", "tests", "docs", "examples", "benchmarks", "experiments")
PATH = re.compile(
    rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w/.-]*[\w/]|(?<=`)[\w/-]+\.(?:py|md|toml|txt)(?=`)"
)
PUBLIC_NAME = re.compile(r"(?<=`)varkit(?:\.\w+)+(?=[`(])")
NAMED_TEST = re.compile(r"(tests/\w+\.py)::(\w+)")
MADE = re.compile(r"^```\w+\n# (\S+)$", re.MULTILINE)
"""Files that a page has the reader write: a block whose first line is a comment with the path."""

LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@dataclass(frozen=True)
class Fence:
    """A block of code in a page: its language, the line it starts on, its text."""

    language: str
    line: int
    text: str


def fences(page: str, *languages: str) -> list[Fence]:
    """The fenced blocks of a page in these languages (all by default), in order."""
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", page, re.MULTILINE | re.DOTALL)
    blocks = [Fence(m[1], page.count("\n", 0, m.start(2)) + 1, m[2]) for m in found]
    return [block for block in blocks if not languages or block.language in languages]


def commands(text: str) -> list[list[str]]:
    """The commands of a terminal block: lines after `$ ` where there are any, otherwise every line."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_python(fence: Fence, page: Path, names: dict[str, Any]) -> None:
    """Execute a block among `names`; a traceback shows the page and the line in it."""
    exec(compile("\n" * (fence.line - 1) + fence.text, str(page), "exec"), names)


def check_command(words: list[str]) -> None:
    """Raise `UserError` where `varkit ...` names a command or an option that does not exist; nothing is run."""
    name, options = words[1], words[2:]
    if name not in COMMANDS:
        raise UserError(f"varkit {name} is not a command")
    module, _, attribute = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    if hasattr(command, "narrowed") and options and not options[0].startswith("-"):
        command, options = command.narrowed(options[0]), options[1:]
    parse(command, f"varkit {name}", options)


def wrong_references(page: Path) -> Iterable[str]:
    """What a page names and the repository does not have: files, folders, links, tests, public names."""
    text = page.read_text(encoding="utf-8")
    made = set(MADE.findall(text))
    yield from (path for path in PATH.findall(text) if path not in made and not (ROOT / path).exists())
    links = [link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
    yield from (link for link in links if not (page.parent / link).exists())
    for file, test in NAMED_TEST.findall(text):
        if not (ROOT / file).exists() or f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"):
            yield f"{file}::{test}"
    yield from (name for name in PUBLIC_NAME.findall(text) if not is_importable(name))


def is_importable(name: str) -> bool:
    """Whether the longest importable module in a dotted name has the rest of it as attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def skip_without_weights(source: str) -> None:
    """Skip where the bundled model that `source` loads is not part of this checkout."""
    for name in re.findall(r"load\(\"(\w+)\"\)", source):
        if name not in bundled():
            pytest.skip(f"the bundled model {name!r} is not in varkit/weights of this checkout")


def test_pages_and_examples_are_there():
    assert {"architecture.md", "training.md", "data.md", "log.md"} <= {page.name for page in PAGES}
    assert {"generate.py", "previews.py", "custom_order.py", "inpaint.py"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_a_page_names_exists(page: Path):
    assert not (wrong := sorted(set(wrong_references(page)))), f"{page.name} names what is not there: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_a_page_can_be_typed(page: Path):
    for fence in fences(page.read_text(encoding="utf-8"), "console", "sh"):
        for words in commands(fence.text):
            if words[0] == "varkit":
                check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = page.read_text(encoding="utf-8")
    skip_without_weights(text)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for fence in fences(text, "python"):
        run_python(fence, page, names)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_and_leaves_pictures(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    skip_without_weights(example.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    written = sorted(tmp_path.iterdir())
    assert written, f"{example.name} left nothing"
    for path in written:
        with Image.open(path) as picture:
            picture.load()


def test_the_order_of_the_example_keeps_the_contract():
    """Every position once, the given number of evaluations, and cached stepping equal to the packed sequence."""
    names = runpy.run_path(str(ROOT / "examples" / "custom_order.py"))
    case = replace(CASES["llamagen-class"], plan=names["DiagonalConfig"]((3, 4)))
    tokenizer, model = case.build(torch.float64)
    steps = model.plan.steps  # type: ignore[attr-defined]
    assert torch.cat([step.target for step in steps]).sort().values.tolist() == list(range(12))
    assert len(steps) == 3 + 4 - 1
    latents = true_latents(tokenizer, model, 2)
    state = start(tokenizer, model, case.conditions(2))
    cached = force(model, state, latents)
    canvas = filled(tokenizer, latents)
    for k, step in enumerate(steps):
        prefix = pack(steps[: k + 1])
        with torch.no_grad():
            fed = canvas.feed(prefix.feed)
            own = prefix.sees.own_mask(len(prefix.feed))
            h = model.generator(fed, prefix, state.prepared, Packed(own, branches=2))
        twin = h[:, -len(step.feed) :]
        assert (cached[k] - twin).abs().max() <= 1e-9 * twin.std()


def token_size(config: Any) -> str:
    """How large a token is, in the words of docs/training.md."""
    if isinstance(config, BitwiseConfig):
        return f"{config.conv.latent_channels * config.patch**2} bits a token"
    return (
        f"{config.token_channels} numbers a token"
        if isinstance(config, KLConfig)
        else f"{config.vocab_size} codes"
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_table_of_recipes_has_the_recipes_own_figures(name: str):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    recipe = RECIPES[name]()
    stages = (recipe.tokenizer, recipe.generator)
    sizes = [sum(p.numel() for p in stage.config.build().parameters()) / 1e6 for stage in stages]
    lengths = [stage.train.steps or stage.train.minutes for stage in stages]
    figures = [*(f"{size:.1f} M" for size in sizes), token_size(recipe.tokenizer.config)]
    missing = [figure for figure in [*figures, *(f"{length:g}" for length in lengths)] if figure not in row]
    assert not missing, f"the recipe {name!r} has {missing}, docs/training.md says {row}"


PAGE = """
```console
$ varkit generate 'a red circle' \\
    --n 2       # two of them
drawn
$ make test
```
```python
x = 1
```
```sh
varkit train scenes --out run
```
"""


def test_blocks_and_commands_are_found():
    assert [(f.language, f.line) for f in fences(PAGE)] == [("console", 3), ("python", 9), ("sh", 12)]
    (console,) = fences(PAGE, "console")
    assert commands(console.text) == [["varkit", "generate", "a red circle", "--n", "2"], ["make", "test"]]
    names: dict[str, Any] = {}
    run_python(fences(PAGE, "python")[0], Path("page.md"), names)
    assert names["x"] == 1
    with pytest.raises(UserError, match="--nn"):
        check_command(["varkit", "generate", "a red circle", "--nn", "2"])
    check_command(["varkit", "adapt", "sar", "runs/digits", "--out", "x", "--gamma", "1"])
    with pytest.raises(UserError, match="--gama"):
        check_command(["varkit", "adapt", "sar", "runs/digits", "--out", "x", "--gama", "1"])
    with pytest.raises(UserError, match="paint"):
        check_command(["varkit", "paint"])


def test_wrong_references_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    wrong = ["varkit/no/file.py", "tests/no.py", "gone.md", "tests/test_docs.py::test_no", "varkit.no.name"]
    page.write_text(
        "See varkit/no/file.py, `tests/no.py`, [this](gone.md), `tests/test_docs.py::test_no` and "
        "`varkit.no.name`; but varkit/plans/step.py, `varkit.load`, `varkit.decode.loop.advance(model, state)`, "
        "[that](https://example.org) and `tests/test_docs.py::test_blocks_and_commands_are_found` are there."
    )
    assert sorted(set(wrong_references(page))) == sorted(wrong)
