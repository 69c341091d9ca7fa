"""The frame of the command line: quick help, typed options, one line for each error, exit codes."""

import errno
import json
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from varkit.cli import main as cli
from varkit.cli.console import print_json, print_table, progress
from varkit.cli.runner import BROKE, EXIT_CODES, INTERRUPTED, READER_LEFT, WRONG_INPUT, run_guarded
from varkit.errors import UserError

VARKIT = [sys.executable, "-m", "varkit"]


def varkit(*args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*VARKIT, *args], capture_output=True, text=True, timeout=30)


def guarded(error: BaseException) -> int:
    def command() -> None:
        raise error

    return run_guarded(command)


@pytest.fixture
def shout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The worked example of main.py's docstring, registered as a command."""
    assert cli.__doc__
    example = re.search(r"A worked example:\n(.*)\nand its row", cli.__doc__, re.DOTALL)
    assert example
    (tmp_path / "shout_example.py").write_text(textwrap.dedent(example[1]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "shout", "shout_example:Shout")
    return lambda *args: cli.main(["shout", *args])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr, which must be one line; stdout must be empty."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("varkit: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from varkit.cli.main import main; main(['--help']);"
        "print([m for m in ('torch', 'numpy', 'PIL', 'rich') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]", run.stdout
    seconds = []
    for _ in range(3):  # processor time, since other work on the machine stretches the wall clock
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert varkit("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) <= 0.4


def test_every_command_is_listed_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} +\S", overview, re.MULTILINE), name
        assert cli.main([name, "--help"]) == 0
        assert f"usage: varkit {name}" in capsys.readouterr().out


def test_exit_codes_are_told_where_users_read(capsys: pytest.CaptureFixture[str]) -> None:
    told = dict(re.findall(r"(\d+) ([^,]+)", EXIT_CODES))
    assert set(map(int, told)) == {0, BROKE, WRONG_INPUT, INTERRUPTED, READER_LEFT}
    assert cli.main(["--help"]) == 0
    readme = Path(__file__).parent.parent / "README.md"
    for text in (capsys.readouterr().out, readme.read_text(encoding="utf-8")):
        assert EXIT_CODES in " ".join(text.split())


def test_version() -> None:
    run = varkit("version", "--json")
    facts = json.loads(run.stdout)
    assert (run.returncode, run.stderr) == (0, "")
    assert facts["varkit"] == varkit("--version").stdout.split()[1]
    assert facts["torch"].startswith("2.") and facts["threads"] >= 1 and facts["hardware"]["cores"] >= 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["vershon"], ["unknown command 'vershon'", "'version'"]),
        (["version", "--jsno"], ["unknown option '--jsno'", "'--json'"]),
        (["version", "a", "b"], ["unexpected 'a b'", "quotes"]),
        (["--json", "version"], ["'--json'", "varkit COMMAND --json"]),
    ],
)
def test_wrong_words(args: list[str], says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    line = one_line(capsys)
    assert all(part in line for part in says), line


def test_worked_example(
    shout: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert shout() == 0
    assert capsys.readouterr().out == "HELLO\n"
    assert shout("a red circle", "--out", str(tmp_path / "new" / "a.txt"), "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"text": "A RED CIRCLE"} and err == ""
    assert (tmp_path / "new" / "a.txt").read_text() == "A RED CIRCLE"
    assert shout("--help") == 0
    assert "[TEXT]" in (text := capsys.readouterr().out) and "How often." in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--times", "x"], ["--times INT", "'x'"]),
        (["--times", "0"], ["--times is 0; it must be at least 1"]),
        (["--times"], ["--times"]),
        (["--tims=3"], ["unknown option '--tims'", "'--times'"]),
        (["a", "red", "circle"], ["unexpected 'red circle'"]),
        (["--out", "/dev/null"], ["'/dev/null'", "not a regular file"]),
    ],
)
def test_wrong_options(
    shout: Callable[..., int], args: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert shout(*args) == 2
    line = one_line(capsys)
    assert all(part in line for part in says), line


def test_missing_options_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
        from dataclasses import dataclass
        from pathlib import Path
        from tyro.conf import Positional

        @dataclass(frozen=True)
        class Learn:
            "Learn."
            recipe: Positional[str]
            "What to learn, in so many words that a terminal would have to wrap them over some lines."
            out: Path
            "Where to."
            def run(self): ...
    """
    (tmp_path / "learn_example.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "learn", "learn_example:Learn")
    assert cli.main(["learn"]) == 2
    assert "missing: RECIPE, --out PATH; see varkit learn --help" in one_line(capsys)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("--n is 0;\n it must be at least 1"), 2, ["error: --n is 0; it must be at least 1"]),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.txt"), 2, ["'x.txt'", "check the path"]),
        (PermissionError(errno.EACCES, "Permission denied", "x.txt"), 2, ["'x.txt'", "permission"]),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 2, ["'x' is a folder"]),
        (FileNotFoundError("no path known"), 1, ["FileNotFoundError: no path known"]),
        (RuntimeError("shapes\n  differ."), 1, ["RuntimeError: shapes differ; run with --debug"]),
        (MemoryError(), 1, ["error: MemoryError; run with"]),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), 1, ["'a.png'", "free some space"]),
        (ModuleNotFoundError("No module", name="gradio.themes"), 1, ["pip install 'varkit[studio]'"]),
        (KeyboardInterrupt(), 130, ["varkit: interrupted; "]),
        (KeyboardInterrupt("saved step 7; continue with --resume"), 130, ["saved step 7"]),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(error) == code
    line = one_line(capsys)
    assert all(part in line for part in says), line


def test_value_errors_are_the_users_only_when_varkit_wrote_them(capsys: pytest.CaptureFixture[str]) -> None:
    from varkit.files import write_json

    namespace = {"__name__": "varkit.nn.example"}
    exec("def command(): raise ValueError('--depth is 0; it must be at least 1')", namespace)
    command: Callable[[], None] = namespace["command"]  # type: ignore[assignment]
    assert run_guarded(command) == 2
    assert one_line(capsys) == "varkit: error: --depth is 0; it must be at least 1\n"
    assert run_guarded(lambda: write_json("never-written.json", float("nan"))) == 1
    assert "ValueError: Out of range float" in one_line(capsys)


def test_debug_anywhere_shows_the_traceback(
    shout: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert shout("--debug", "--times", "0") == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("varkit: error: --times is 0")


def test_reader_that_leaves_is_no_error() -> None:
    code = (
        "import sys; from varkit.cli.runner import run_guarded;"
        "sys.exit(run_guarded(lambda: [print(i) for i in range(10**5)] and 0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=20) == 141


def test_exit_code_survives_a_lost_stderr() -> None:
    process = subprocess.Popen([*VARKIT, "vershon"], stderr=subprocess.PIPE)
    assert process.stderr
    process.stderr.close()
    assert process.wait(timeout=20) == 2


def test_broken_pipe_of_a_worker_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(BrokenPipeError(errno.EPIPE, "Broken pipe")) == 1
    assert "BrokenPipeError" in one_line(capsys)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_under_stdout() -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run([*VARKIT, "version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1 and "no space left on device while writing the output" in run.stderr


def test_ctrl_c() -> None:
    code = (
        "import time, sys; from varkit.cli.runner import run_guarded;"
        "sys.exit(run_guarded(lambda: print('on', flush=True) or time.sleep(60)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "varkit: interrupted; nothing was left half-written\n"


def test_console_keeps_results_and_progress_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("drawing", total=2) as advance:
        advance()
        advance(note="last")
    print_table(["name", "says"], [["var", "[bold]" + "x" * 200], ["mar", None]], title="systems")
    out, err = capsys.readouterr()
    assert "[bold]" + "x" * 200 in out and err == ""
    assert [line.split()[0] for line in out.splitlines()] == ["systems", "name", "var", "mar"]
    print_json({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    with pytest.raises(ValueError):
        print_json({"a": float("inf")})
