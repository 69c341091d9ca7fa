"""Features of prompts in a file: both layouts, both formats, the commands that write and use them, and other files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from tests import text_models
from tests.text_models import LONG, PROMPTS, SHORT, WIDTH
from varkit.cli.generate import Generate
from varkit.cli.main import main
from varkit.errors import UserError
from varkit.hub.embeddings import Embeddings, save_embeddings
from varkit.hub.text_encoders import PretrainedEncoder

t5, clip, features_model = text_models.t5, text_models.clip, text_models.features_model
SUFFIXES = [".npz", ".safetensors"]


def write(path: Path, **arrays: np.ndarray) -> Path:
    """Plain arrays in either format; prompts are metadata in a .safetensors."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return path
    prompts = arrays.pop("prompts", None)
    metadata = {} if prompts is None else {"prompts": json.dumps([str(p) for p in prompts])}
    save_file(
        {name: torch.from_numpy(np.asarray(array, order="C")) for name, array in arrays.items()},
        path,
        metadata,
    )
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_is_saved_is_read_again(tmp_path_factory, suffix: str, lengths: list[int], dtype: torch.dtype):
    path = tmp_path_factory.mktemp("embeddings") / f"file{suffix}"
    rows = {f"prompt {i}, \u00fc \U0001f600": torch.randn(n, 4).to(dtype) for i, n in enumerate(lengths)}
    save_embeddings(path, rows)
    read = Embeddings.load(path)
    assert read.prompts == list(rows) and read.width == 4
    for prompt, features in rows.items():
        assert read.count(prompt) == len(features) and torch.equal(
            read.encode(prompt).float(), features.float()
        )
        if suffix == ".safetensors":
            assert read.encode(prompt).dtype == dtype


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_padded_features_with_a_mask(tmp_path: Path, suffix: str):
    features = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])  # padding may stand on either side
    read = Embeddings.load(write(tmp_path / f"padded{suffix}", features=features, mask=mask))
    assert read.prompts == ["0", "1", "2"] and [read.count(p) for p in read.prompts] == [2, 2, 4]
    assert np.array_equal(read.encode("1").numpy(), features[1, 2:])
    named = write(
        tmp_path / f"named{suffix}", features=features, mask=mask > 0, prompts=np.array(["a", "b", "c"])
    )
    assert np.array_equal(Embeddings.load(named).encode("a").numpy(), features[0, :2])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pictures_of_embeddings_are_those_of_the_encoder(t5: Path, tmp_path: Path, suffix: str):
    encoder, pipeline = PretrainedEncoder.load(t5), text_models.infinity()
    save_embeddings(tmp_path / f"e{suffix}", {prompt: encoder.encode(prompt) for prompt in PROMPTS})
    drawn = [
        [image.tobytes() for image in pipeline.with_text(source).generate(PROMPTS, seed=1, negative="blue")]
        for source in (encoder, Embeddings.load(tmp_path / f"e{suffix}"))
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == len(PROMPTS)


ONES = np.ones((2, 3, 4), np.float32)
MASK = ONES[..., 0]
WRONG: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "nothing told": ({"features": ONES}, "it has features;"),
    "other names": ({"text": ONES, "mask": MASK}, "it has mask, text"),
    "mask of another shape": ({"features": ONES, "mask": MASK[:, :2]}, r"\(2, 3, 4\) and its mask \(2, 2\)"),
    "lengths of padded features": ({"features": ONES, "lengths": np.array([3, 3])}, "features are"),
    "lengths of something else": ({"features": ONES[0], "lengths": np.array([1, 1])}, r"its lengths \(2,\)"),
    "an empty prompt": ({"features": ONES[0], "lengths": np.array([3, 0])}, "one without a token"),
    "no prompt": ({"features": ONES[0, :0], "lengths": np.array([], np.int64)}, "no prompt"),
    "fewer prompts": ({"features": ONES, "mask": MASK, "prompts": np.array(["a"])}, "1 prompts and features of 2"),
    "complex features": ({"features": ONES + 1j, "mask": MASK}, "features is complex64, not floating-point"),
    "whole features": ({"features": MASK.astype(int), "lengths": np.array([2])}, "dtype of its features is int64"),
    "complex lengths": ({"features": ONES[0], "lengths": np.array([3], np.complex64)}, "its lengths is complex64"),
    "parts of a token": ({"features": ONES[0], "lengths": np.array([1.5, 1.5])}, "its lengths are no whole numbers"),
    "lengths that wrap": ({"features": ONES[0], "lengths": np.array([2**62] * 3 + [2**62 + 3])}, r"lengths \(4,\)"),
    "lengths without an axis": ({"features": ONES[0], "lengths": np.array(3)}, r"its lengths \(\)"),
    "a mask without an axis": ({"features": ONES, "mask": np.array(1)}, r"its mask \(\)"),
    "complex mask": ({"features": ONES, "mask": MASK * 1j}, "the dtype of its mask is complex64"),
    "a mask to be added": ({"features": ONES, "mask": MASK * -np.inf}, "its mask has NaN or infinity"),
    "features without an axis": ({"features": np.array(1.0), "mask": MASK}, r"its features are \(\)"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", WRONG)
def test_files_of_another_layout(tmp_path: Path, suffix: str, name: str):
    arrays, says = WRONG[name]
    path = write(tmp_path / f"wrong{suffix}", **arrays)
    with pytest.raises(UserError, match=f"holds no embeddings: .*{says}") as error:
        Embeddings.load(path)
    assert "features (N, T, D) with mask (N, T), as varkit embed writes" in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"features": np.array(["a", "b"]), "lengths": np.ones(2)}, "the dtype of its features is <U1"),
        ({"features": ONES[0], "lengths": np.array(["3"])}, "the dtype of its lengths is <U1"),
        ({"features": ONES, "mask": MASK.astype("S")}, r"the dtype of its mask is \|S"),
        ({"features": ONES.astype("V4"), "mask": MASK}, r"its features is \|V4"),  # bfloat16, to NumPy
        ({"features": ONES.astype(np.longdouble), "mask": MASK}, "its features is float128"),
        ({"features": ONES, "mask": MASK, "prompts": np.array("ab")}, "its prompts are no list of texts"),
        ({"features": ONES, "mask": MASK, "prompts": np.array([["a"], ["b"]])}, "no list of texts"),
        ({"features": ONES, "mask": MASK, "prompts": np.array([b"a", b"b"])}, "no list of texts"),
    ],
)
def test_arrays_of_another_kind(tmp_path: Path, arrays: dict[str, np.ndarray], says: str):
    with pytest.raises(UserError, match=f"holds no embeddings: .*{says}"):
        Embeddings.load(write(tmp_path / "wrong.npz", **arrays))


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("a, b", "its prompts are no JSON"),
        ("[" * 100_000, "its prompts are no JSON"),
        ("5", "its prompts are no list of texts"),
        ("null", "its prompts are no list of texts"),
        ('"ab"', "its prompts are no list of texts"),
        ('{"a": 0, "b": 1}', "its prompts are no list of texts"),
        ('["a", null]', "its prompts are no list of texts"),
        ('[["a"], ["b"]]', "its prompts are no list of texts"),
    ],
)
def test_metadata_of_another_kind(tmp_path: Path, prompts: str, says: str):
    tensors = {"features": torch.ones(2, 3, 4), "mask": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "wrong.safetensors", {"prompts": prompts})
    with pytest.raises(UserError, match=f"holds no embeddings: {says}"):
        Embeddings.load(tmp_path / "wrong.safetensors")


def test_prompts_among_the_tensors_are_not_read(tmp_path: Path):
    tensors = {"features": torch.ones(2, 4), "lengths": torch.ones(2), "prompts": torch.ones(2, 7)}
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match="holds no embeddings: its prompts are no list of texts"):
        Embeddings.load(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, torch.uint32]
)
def test_masks_and_lengths_of_any_dtype(tmp_path: Path, dtype: torch.dtype):
    features, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 0]])
    other = {"attention": torch.ones(3, dtype=torch.bfloat16)}  # what else lies there does not matter
    save_file({"features": features, "mask": mask.to(dtype)} | other, tmp_path / "mask.safetensors")
    padded = Embeddings.load(tmp_path / "mask.safetensors")
    assert [padded.count(p) for p in padded.prompts] == [2, 1]
    assert torch.equal(padded.encode("1"), features[1, 1:2])
    lengths = torch.tensor([1, 1, 1] if dtype == torch.bool else [1, 3, 2]).to(dtype)
    packed = features.flatten(0, 1)[: int(lengths.sum())]
    save_file({"features": packed, "lengths": lengths}, tmp_path / "lengths.safetensors")
    read = Embeddings.load(tmp_path / "lengths.safetensors")
    assert [read.count(p) for p in read.prompts] == lengths.long().tolist()
    assert torch.equal(torch.cat([read.encode(p) for p in read.prompts]), packed)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_prompt_there_twice_with_the_same_features_is_one(tmp_path: Path, suffix: str):
    twice = {"features": ONES, "mask": MASK, "prompts": np.array(["a", "a"])}
    read = Embeddings.load(write(tmp_path / f"twice{suffix}", **twice))
    assert read.prompts == ["a"] and torch.equal(read.encode("a"), torch.ones(3, 4))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_one_prompt_that_differ(tmp_path: Path, suffix: str):
    features = np.arange(12.0).reshape(3, 4)
    prompts = np.array(["a", "b", "a"])
    path = write(tmp_path / f"twice{suffix}", features=features, lengths=np.ones(3, int), prompts=prompts)
    with pytest.raises(
        UserError, match="has prompt 'a' in rows 0 and 2 with features that differ; keep one row"
    ):
        Embeddings.load(path)


def test_files_that_are_something_else(tmp_path: Path):
    for suffix in SUFFIXES:
        (tmp_path / f"text{suffix}").write_text("a red circle")
        with pytest.raises(UserError, match="is damaged"):
            Embeddings.load(tmp_path / f"text{suffix}")
        with pytest.raises(UserError, match="there is no file"):
            Embeddings.load(tmp_path / f"nowhere{suffix}")
    np.savez(tmp_path / "code.npz", features=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="holds more than plain arrays"):
        Embeddings.load(tmp_path / "code.npz")
    np.savez_compressed(tmp_path / "packed.npz", features=np.random.default_rng(0).normal(size=(9, 9)))
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[len(packed) // 3 : len(packed) // 2] = bytes(len(packed) // 2 - len(packed) // 3)
    (tmp_path / "packed.npz").write_bytes(packed)
    with pytest.raises(UserError, match="is damaged"):
        Embeddings.load(tmp_path / "packed.npz")
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, ONES)
    with pytest.raises(UserError, match=r"holds more than plain arrays \(it is one array alone, an .npy\)"):
        Embeddings.load(tmp_path / "single.npz")
    with pytest.raises(UserError, match="is no name for embeddings; it must end in .npz or .safetensors"):
        Embeddings.load(tmp_path / "features.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_no_numbers_draw_nothing(tmp_path: Path, suffix: str, bad: float):
    features = np.ones((2, 3, WIDTH), np.float32)
    features[1, 2, 5] = bad
    path = write(tmp_path / f"e{suffix}", features=features, mask=MASK, prompts=np.array(["a", "b"]))
    pipeline = text_models.infinity().with_text(Embeddings.load(path))
    pipeline.generate("a")
    with pytest.raises(UserError, match="the features of 'b' have NaN or infinity; compute them anew"):
        pipeline.generate(["a", "b"])


def test_prompts_that_are_not_there(tmp_path: Path):
    save_embeddings(tmp_path / "e.npz", {"a red circle": torch.ones(2, 3)})
    with pytest.raises(UserError, match="unknown prompt 'a rod circle'; did you mean 'a red circle'"):
        Embeddings.load(tmp_path / "e.npz").count("a rod circle")


# Commands


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ten prompts of many lengths, in prompts.txt of the working directory."""
    monkeypatch.chdir(tmp_path)
    words = LONG.split()
    made = [" ".join(words[:n]) for n in range(1, 11)]
    Path("prompts.txt").write_text("\n".join(made))
    return made


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_embeddings_draw_what_the_encoder_draws_however_it_is_shared(
    t5: Path, features_model: Path, prompts: list[str], suffix: str
):
    model = ("--model", features_model, "--seed", 4, "--negative", "blue circle of a")
    run("generate", "--prompts", "prompts.txt", *model, "--text-encoder", t5, "--out", "words")
    run("embed", "prompts.txt", "--text-encoder", t5, "--out", f"e{suffix}", "--negative", "blue circle of a")
    run("generate", "--prompts", "prompts.txt", *model, "--embeddings", f"e{suffix}", "--out", "features")
    run("generate", *model, "--embeddings", f"e{suffix}", "--out", "all")
    for share in range(3):
        shared = ("--shard", f"{share}/3", "--out", "shared")
        run("generate", "--prompts", "prompts.txt", *model, "--text-encoder", t5, *shared)
    whole = drawn(Path("words"))
    assert len(whole) == len(prompts) == len(set(whole.values()))
    assert whole == drawn(Path("features")) == drawn(Path("all")) == drawn(Path("shared"))
    run("generate", "--prompts", "prompts.txt", *model[:4], "--text-encoder", t5, "--out", "plain")
    assert drawn(Path("plain")) != whole


def test_a_caption_is_enough(t5: Path, features_model: Path, prompts: list[str]):
    run("generate", SHORT, "--model", features_model, "--text-encoder", t5, "--out", "a.png")
    messy = SHORT.upper() + " https://example.com"
    options = ("--model", features_model, "--text-encoder", t5, "--clean-prompts", "--out", "b.png")
    run("generate", messy, *options)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_the_text_encoder_computes_in_the_dtype_of_the_command(
    t5: Path, features_model: Path, prompts: list[str]
):
    model = ("--prompts", "prompts.txt", "--model", features_model)
    for dtype in ("float32", "bfloat16"):
        run("embed", "prompts.txt", "--text-encoder", t5, "--out", f"{dtype}.npz", "--dtype", dtype)
    run("generate", *model, "--text-encoder", t5, "--out", "stored")
    run("generate", *model, "--embeddings", "float32.npz", "--out", "float32")
    assert drawn(Path("stored")) == drawn(Path("float32"))
    cast = ("--dtype", "bfloat16")
    run("generate", *model, *cast, "--text-encoder", t5, "--out", "words")
    run("generate", *model, *cast, "--embeddings", "bfloat16.npz", "--out", "bfloat16")
    run("generate", *model, *cast, "--embeddings", "float32.npz", "--out", "mixed")
    assert drawn(Path("words")) == drawn(Path("bfloat16")) != drawn(Path("mixed"))


@pytest.mark.parametrize(
    ("options", "dtype", "places"),
    [
        ({}, torch.float32, []),
        ({"dtype": "bfloat16"}, torch.bfloat16, []),
        ({"device": "cpu"}, torch.float32, ["cpu"]),
        ({"device": "cpu", "dtype": "float16"}, torch.float16, ["cpu"]),
    ],
)
def test_the_text_encoder_goes_where_the_command_says(
    t5: Path,
    features_model: Path,
    monkeypatch,
    options: dict[str, str],
    dtype: torch.dtype,
    places: list[str],
):
    moved: list[str] = []
    monkeypatch.setattr(PretrainedEncoder, "to", lambda self, place: moved.append(str(place)) or self)
    command = Generate(caption=SHORT, model=str(features_model), text_encoder=str(t5), **options)
    source = command.opened().how.text
    assert source is not None and source.encode(SHORT).dtype == dtype and moved == places


def test_one_line_for_each_mistake(
    t5: Path, features_model: Path, prompts: list[str], capsys, tmp_path: Path
):
    def fails(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1, err
        assert not list(tmp_path.glob("*.png"))
        return err

    model = ("generate", SHORT, "--model", features_model)
    assert "not words; give --text-encoder or --embeddings" in fails(*model)
    narrow = text_models.save_t5(tmp_path / "narrow", width=16)
    capsys.readouterr()
    assert "of 16 channels do not fit this model, which takes 32" in fails(*model, "--text-encoder", narrow)
    write(tmp_path / "narrow.npz", features=ONES, mask=ONES[..., 0])
    assert "of 4 channels do not fit" in fails(*model, "--embeddings", "narrow.npz")
    write(tmp_path / "wide.npz", features=np.ones((2, 3, WIDTH), np.float32), mask=ONES[..., 0])
    assert "unknown prompt 'a red circle'" in fails(*model, "--embeddings", "wide.npz")
    write(tmp_path / "other.npz", features=ONES)
    assert "holds no embeddings" in fails(*model, "--embeddings", "other.npz")
    write(tmp_path / "complex.npz", features=np.ones((2, 3, WIDTH), np.complex64), mask=MASK)
    assert "holds no embeddings: the dtype of its features is complex64" in fails(
        *model, "--embeddings", "complex.npz"
    )
    write(
        tmp_path / "twice.npz",
        features=np.ones((2, 3, WIDTH), np.float32),
        mask=MASK,
        prompts=np.array([SHORT, SHORT]),
    )
    said = fails(*model, "--embeddings", "twice.npz")
    assert "'twice.npz' has 2 prompts of which 1 differ: row 0 is there once more" in said
    assert "there is no text encoder in '/no/where'" in fails(*model, "--text-encoder", "/no/where")
    assert "give one of them" in fails(*model, "--text-encoder", t5, "--embeddings", "wide.npz")
    assert "--clean-prompts is for what a text encoder reads" in fails(*model, "--clean-prompts")
    given = ("--text-encoder", t5, "--negative", "a", "--guidance", 1)
    assert "a negative prompt needs guidance" in fails(*model, *given)
    assert "no name for embeddings" in fails("embed", "prompts.txt", "--text-encoder", t5, "--out", "e.pt")
    assert "takes no features" in fails("generate", "--label", 1, "--model", "digits", "--text-encoder", t5)


def test_an_edit_reads_words_as_drawing_does(t5: Path, features_model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save("mine.png")
    Path("short.txt").write_text(SHORT)
    words = ("edit", "mine.png", "--box", 0, 0, 1, 0.5, "--model", features_model, "--raw")
    run("embed", "short.txt", "--text-encoder", t5, "--out", "e.npz")
    run(*words, SHORT, "--text-encoder", t5, "--out", "a.png")
    run(*words, SHORT, "--embeddings", "e.npz", "--out", "b.png")
    run(*words, LONG, "--text-encoder", t5, "--out", "c.png")
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


@pytest.mark.parametrize("command", ["serve", "studio"])
def test_a_server_takes_no_model_that_it_cannot_read_words_for(command: str, features_model: Path, capsys):
    assert main([command, "--model", str(features_model), "--port", "0"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "takes features of words, which are not computed here" in err
