"""The catalogue: 52 systems and 3 substrates, all in one vocabulary; states are derived; the command and its page."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_layout import PACKAGE, TIER_OF
from varkit.catalog import places, standing
from varkit.catalog.page import page
from varkit.catalog.registry import FOLDER, find, read_folder, read_record, records, systems
from varkit.catalog.standing import Standing, is_defined
from varkit.catalog.system import System
from varkit.catalog.vocabulary import FAMILIES, FAMILY_OF_UNIT, ROOM, UNIT
from varkit.cli import main as cli
from varkit.errors import UserError

ROOT = PACKAGE.parent
RECORD = (FOLDER / "var.toml").read_text(encoding="utf-8")
LISTED = ("name", "title", "arxiv", "family", "state", "code", "claim", "measured", "holds")


@pytest.fixture(params=records(), ids=str)
def record(request: pytest.FixtureRequest) -> System:
    return find(request.param)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of experiments in place of the real one."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(standing, "experiments_folder", lambda: tmp_path)
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["systems", *args]) == 0
    return capsys.readouterr().out


def wrong(folder: Path, old: str, new: str) -> str:
    """The error that var's record gives with `old` replaced by `new`."""
    assert old in RECORD
    path = folder / "var.toml"
    path.write_text(RECORD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_record(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_there_are_52_systems_and_3_substrates():
    assert len(systems()) == 52
    assert set(records()) - {system.name for system in systems()} == {"llamagen", "infinity", "mar"}
    names = [system.name for system in systems()]
    assert names == sorted(set(names))
    papers = [system.arxiv for system in records().values()]
    assert len(set(papers)) == len(papers)


def test_a_record_says_what_it_claims(record: System):
    assert len(record.summary) <= 180 and record.summary.endswith(".")
    assert record.family in FAMILIES
    for claim in record.claims:
        assert claim.baseline or not claim.baseline_value, "a figure of nobody"


def test_bases_lead_to_something_without_a_base(record: System):
    assert not set(record.base) - set(records())
    seen, waiting = set(), list(record.base)
    while waiting:
        name = waiting.pop()
        assert name != record.name, f"{name} builds on itself"
        if name not in seen:
            seen.add(name)
            waiting += find(name).base


def test_code_is_there_and_imports(record: System):
    for path in record.code:
        module, _, name = path.partition(":")
        assert is_defined(path)
        assert hasattr(importlib.import_module(module), name)


def test_var_and_the_raster_substrate_have_code():
    assert find("var").code and find("llamagen").code


def test_vocabulary_names_rooms_and_units_that_exist():
    assert {room.partition("/")[0] for room in ROOM} <= set(TIER_OF)
    assert FAMILY_OF_UNIT.keys() <= UNIT.keys() and set(FAMILY_OF_UNIT.values()) < set(FAMILIES)


def test_what_is_derived():
    assert (find("var").family, find("var").year) == ("scale", 2024)
    assert [find(name).family for name in ("survey", "xar", "nfig", "llamagen")] == [
        "pixel",
        "token",
        "other",
        "token",
    ]
    assert str(find("flexvar").claims[0]).startswith("FID: 3.05 against 3.55 of VAR-d16 (")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('unit = "scale"', 'unit = "scala"', ["unknown unit 'scala'", "'scale'", "var.toml"]),
        ('["class-to-image"]', '["clas-to-image"]', ["unknown tasks", "'class-to-image'", "var.toml"]),
        ("head =", "haed =", ["unknown field 'haed'", "'head'", "var.toml"]),
        ('head = "softmax"\n', "", ["var.toml", "lacks the field 'head'"]),
        ('order = "scale"', "order = 3", ["var.toml.order is 3", "a text"]),
        ('arxiv = "2404.02905"', 'arxiv = "arXiv:2404.02905"', ["var.toml", "arxiv", "2404.02905"]),
        ("FoundationVision/VAR", "VAR", ["var.toml", "repository", "owner/name"]),
        ("generators.var:VAR", "generators.var.VAR", ["var.toml", "code", "varkit.module:object"]),
        ('source = "abstract"', 'source = "abstrct"', ["unknown source", "'abstract'", "var.toml"]),
        ('setting = "ImageNet 256"', 'setting = ""', ["var.toml", "claims.setting"]),
        ('setting = "ImageNet 256"\n', "", ["var.toml.claims[0]", "lacks the field 'setting'"]),
        ('tasks = ["class-to-image"]', "tasks = []", ["var.toml", "tasks is empty"]),
        ("[[claims]]", "[[claims", ["var.toml is not TOML"]),
        ('title = "', 'name = "vra"\ntitle = "', ["var.toml", "'name'"]),
    ],
)
def test_a_wrong_record_is_refused_in_one_line(tmp_path: Path, old: str, new: str, says: list[str]):
    line = wrong(tmp_path, old, new)
    assert all(part in line for part in says), line


def test_an_unknown_base_is_refused(tmp_path: Path):
    for name in ("var", "vaz"):
        (tmp_path / f"{name}.toml").write_text(RECORD, encoding="utf-8")
    (tmp_path / "flexvar.toml").write_text('base = ["va"]\n' + RECORD, encoding="utf-8")
    with pytest.raises(UserError, match="unknown base 'va'; did you mean .*'var'.*flexvar.toml"):
        read_folder(tmp_path)


def test_a_state_is_derived_from_code_experiment_and_result(lab: Path):
    var = find("var")
    result = lab / "results" / "var.json"
    assert standing.standing(var) == Standing("implemented")
    result.write_text('{"name": "var", "paper": "-", "measured": "7 against 9", "holds": false}')
    assert standing.standing(var) == Standing("implemented")
    (lab / "var.py").touch()
    assert standing.standing(var) == Standing("works", "7 against 9", False)
    for name in ("flexvar.toml", "results/flexvar.json"):
        (lab / name).write_text(result.read_text())
    assert standing.standing(replace(var, name="flexvar", code=())) == Standing("planned")
    gone = replace(var, code=("varkit.generators.vra:VAR",))
    assert standing.standing(gone) == Standing("planned")
    result.write_text('{"name": "var", "measured": "7 against 9"}')
    with pytest.raises(UserError, match="var.json"):
        standing.standing(var)


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("varkit.generators.var:VARConfig", True),
        ("varkit.catalog.registry:FOLDER", True),
        ("varkit.cli.main:COMMANDS", True),
        ("varkit.generators.var:Tensor", False),
        ("varkit.generators.vra:VAR", False),
        ("varkit.generators:var", False),
    ],
)
def test_objects_are_found_without_importing_them(path: str, there: bool):
    assert is_defined(path) is there


def test_experiments_lie_beside_the_package_unless_they_were_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "varkit")
    assert places.experiments_folder() == tmp_path / "experiments"
    (tmp_path / "varkit" / "experiments").mkdir(parents=True)
    assert places.experiments_folder() == tmp_path / "varkit" / "experiments"


def test_the_page_is_up_to_date():
    written = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    assert written == page(systems()), "run: varkit systems --markdown > docs/systems.md"


def test_the_command_lists_all_systems_as_json(capsys: pytest.CaptureFixture[str]):
    shown = json.loads(output(capsys, "--json"))
    assert list(shown) == ["systems"] and len(shown["systems"]) == 52
    for row in shown["systems"]:
        assert set(LISTED) <= set(row)
        assert (row["measured"] is None) == (row["holds"] is None) == (row["state"] != "works")
        assert isinstance(row["code"], list) and isinstance(row["claim"], str)


def test_the_command_filters(capsys: pytest.CaptureFixture[str]):
    rows = json.loads(output(capsys, "--json", "--family", "scale", "--task", "editing"))["systems"]
    assert [row["name"] for row in rows] == ["structure-edit", "varedit"]
    states = [len(json.loads(output(capsys, "--json", "--state", s))["systems"]) for s in standing.STATES]
    assert sum(states) == 52


def test_the_command_shows_a_result(lab: Path, capsys: pytest.CaptureFixture[str]):
    (lab / "var.py").touch()
    (lab / "results" / "var.json").write_text('{"measured": "7 against 9", "holds": true}')
    (line,) = output(capsys, "--state", "works").splitlines()[1:]
    assert line.split()[0] == "var" and line.rstrip().endswith("yes") and "7 against 9" in line
    assert "| works |" in output(capsys, "--markdown") and "7 against 9" in output(capsys, "var")


def test_the_command_shows_one_record_in_full(capsys: pytest.CaptureFixture[str]):
    shown = output(capsys, "mar")
    assert "2406.11838" in shown and all(str(claim) in shown for claim in find("mar").claims)
    (row,) = json.loads(output(capsys, "var", "--json"))["systems"]
    assert row["name"] == "var" and row["code"] and row["claims"][0]["metric"] == "FID"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["flexvra"], ["unknown system 'flexvra'", "'flexvar'"]),
        (["--family", "scales"], ["unknown family 'scales'", "'scale'"]),
        (["--task", "edit"], ["unknown task 'edit'", "'editing'"]),
        (["--state", "done"], ["unknown state 'done'", "planned"]),
        (["--json", "--markdown"], ["--json and --markdown"]),
        (["var", "--task", "editing"], ["--task", "'var'"]),
    ],
)
def test_wrong_words(args: list[str], says: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["systems", *args]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(part in line for part in says), line


def test_nothing_is_read_at_import_and_torch_is_never_imported():
    script = (
        "import sys\n"
        "from varkit.catalog import registry\n"
        "assert registry.records.cache_info().currsize == 0\n"
        "from varkit.cli.main import main\n"
        "assert main(['systems']) == 0 and main(['systems', 'var']) == 0 and main(['systems', '--json']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
