"""Reference cases of published code pass, and fall short when anything about them is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from varkit.cli.main import main
from varkit.errors import UserError
from varkit.hub import fill
from varkit.hub.verify import Case, verify_case

REFERENCE = Path(__file__).parent / "reference"
INPUTS = {"labels", "infer_labels", "input_tokens", "sampled_gumbel"}
QUICK, FULL = "llamagen_tiny_c2i", "var_tiny"


def outcome(path: Path) -> dict[str, bool]:
    """Whether each array passed."""
    return {row.array: row.passed for row in verify_case(Case.open(path))}


def tampered(folder: Path, name: str, change) -> Path:
    """A copy of a case whose arrays `change` has altered."""
    shutil.copy(REFERENCE / f"{name}.json", folder)
    with np.load(REFERENCE / f"{name}.npz") as stored:
        arrays = dict(stored)
    change(arrays)
    np.savez(folder / f"{name}.npz", **arrays)
    return folder / f"{name}.json"


@pytest.mark.parametrize("name", ["var_tiny", "var_tiny_shared_aln", "llamagen_tiny_c2i", "flexvar_tiny"])
def test_tiny_cases_pass_and_every_array_is_used(name):
    rows = verify_case(Case.open(REFERENCE / f"{name}.json"))
    assert all(row.passed for row in rows), rows
    with np.load(REFERENCE / f"{name}.npz") as arrays:
        assert {row.array for row in rows} == set(arrays)
    assert {row.array for row in rows if row.role == "input"} <= INPUTS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["var_d16_256", "flexvar_tiny_long", "flexvar_d16_256"])
def test_released_size_passes(name):
    assert all(outcome(REFERENCE / f"{name}.json").values())


def test_each_wrong_real_array_is_noticed(tmp_path):
    changed = ["latent", "reconstruction", "teacher_input", "logits", "greedy_image"]

    def change(arrays):
        for array in changed:
            arrays[array].flat[-1] += 0.002

    passed = outcome(tampered(tmp_path, FULL, change))
    assert [array for array, ok in passed.items() if not ok] == changed


@pytest.mark.parametrize("name, array", [(FULL, "tokens"), (FULL, "greedy_tokens"), (QUICK, "greedy_tokens")])
def test_a_wrong_token_is_noticed(tmp_path, name, array):
    def change(arrays):
        arrays[array][0, -1] = (arrays[array][0, -1] + 1) % 50

    assert not outcome(tampered(tmp_path, name, change))[array]


@pytest.mark.parametrize(
    "name, key, first",
    [
        (FULL, "encoder.mid.attn_1.qkv.weight", "latent"),
        (FULL, "quantize.quant_resi.qresi_ls.1.bias", "teacher_input"),
        (FULL, "blocks.1.attn.v_bias", "logits"),
        (QUICK, "layers.1.ffn_norm.weight", "logits"),
    ],
)
def test_a_wrong_weight_is_noticed(monkeypatch, name, key, first):
    true = fill.fill_array
    monkeypatch.setattr(fill, "fill_array", lambda n, *rest: true(n, *rest) * (1.2 if n == key else 1))
    assert not outcome(REFERENCE / f"{name}.json")[first]


def test_an_array_of_another_shape_or_not_used_falls_short(tmp_path, capsys):
    def change(arrays):
        arrays["logits"] = arrays["logits"][:, :-1]
        arrays["unheard_of"] = np.zeros(2)

    assert main(["verify", str(tampered(tmp_path, QUICK, change))]) == 1
    out = capsys.readouterr().out
    assert "unheard_of" in out and out.count("FAIL") == 2


def test_nan_falls_short_and_json_stays_strict(tmp_path, capsys):
    def change(arrays):
        arrays["logits"][0, 0, 0] = np.nan

    assert main(["verify", "--json", str(tampered(tmp_path, QUICK, change))]) == 1
    whole = json.loads(capsys.readouterr().out)
    row = next(row for row in whole["cases"][0]["arrays"] if row["array"] == "logits")
    assert row["passed"] is False and row["error"] is None and whole["passed"] is False


def test_command_passes_and_prints_one_object(capsys):
    case = str(REFERENCE / f"{QUICK}.json")
    assert main(["verify", case, case, "--json"]) == 0
    out = capsys.readouterr().out
    whole = json.loads(out)
    assert whole["passed"] and [c["case"] for c in whole["cases"]] == [QUICK, QUICK]
    assert {row["role"] for row in whole["cases"][0]["arrays"]} == {"input", "compared"}


def broken(folder: Path, **changes) -> Path:
    path = tampered(folder, QUICK, lambda arrays: None)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_wrong_input_exits_with_2_before_any_work(tmp_path, capsys):
    good = str(REFERENCE / f"{FULL}.json")
    assert main(["verify", good, str(broken(tmp_path, family="llamagem"))]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "'llamagem'; did you mean 'llamagen'" in captured.err


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda path: path.with_suffix(".npz").unlink(), "npz' are missing"),
        (lambda path: path.with_suffix(".npz").write_bytes(b"PK\x03\x04..."), "not a readable npz"),
        (lambda path: np.savez(path.with_suffix(".npz"), a=np.array([{}])), "not a readable npz"),
        (lambda path: path.write_text("{"), "is not JSON"),
        (lambda path: path.write_text("[]"), "names no family"),
        (lambda path: path.unlink(), "there is no case"),
        (lambda path: broken(path.parent, config={}), "lacks config.n_head"),
        (
            lambda path: np.savez(path.with_suffix(".npz"), labels=np.zeros(2)),
            "lacks the array 'input_tokens'",
        ),
    ],
)
def test_unreadable_cases_exit_with_2(tmp_path, capsys, spoil, says):
    path = broken(tmp_path)
    spoil(path)
    assert main(["verify", str(path)]) == 2
    assert says in capsys.readouterr().err


def test_no_case_is_a_mistake():
    assert main(["verify"]) == 2


def test_case_refuses_what_it_does_not_hold():
    case = Case.open(REFERENCE / f"{QUICK}.json")
    with pytest.raises(UserError, match="lacks config.nothing"):
        case.entry("config", "nothing")


def test_filled_weights_are_the_published_recipe():
    """Spot values computed by the generator of the reference vectors."""
    for name, shape, seed, values in FILLED:
        assert np.allclose(fill.fill_array(name, shape, seed).flat[:2], values, rtol=0, atol=1e-7), name
    image = fill.image_array((1, 3, 4, 6), seed=2)
    assert image.shape == (1, 3, 4, 6) and np.abs(image).max() <= 1
    assert np.allclose(image.flat[:2], IMAGE, rtol=0, atol=1e-6)


FILLED = [
    ("blocks.0.norm.weight", (4,), 0, [1.08898354, 1.10519302]),
    ("blocks.0.bias", (4,), 0, [-0.142913312, -0.0557495542]),
    ("head.weight", (3, 5), 1, [0.61440593, -0.84572643]),
    ("lvl_embed.weight", (3, 5), 1, [0.577212095, 0.701748788]),
    ("pos_start", (1, 1, 4), 0, [0.459948868, -0.355753064]),
    ("bn.running_var", (2,), 0, [1.0, 1.0]),
]
IMAGE = [-0.396873295, 0.654220343]
