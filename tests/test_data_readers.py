"""Readers of real data: an awkward file ends as pixels or as a counted reason, never as a hang or a crash."""

import io
import json
import os
import socket
import struct
import tracemalloc
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from varkit.data import folder as folder_module
from varkit.data import images as images_module
from varkit.data.arrays import ArrayImages, open_array
from varkit.data.base import Dataset, Report, hash_split
from varkit.data.emoji import Emoji, find_font
from varkit.data.folder import FolderReason, ImageFolder
from varkit.data.images import MAX_PIXELS, BadImage, Reason, check_header, fit, open_alpha, open_image
from varkit.data.real import Digits, Photographs
from varkit.data.registry import open_dataset
from varkit.errors import UserError

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(
    colour: tuple[int, ...] | int | float, size: tuple[int, int] = (6, 4), mode: str = "RGB"
) -> Image.Image:
    return Image.new(mode, size, colour)


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """A PNG made by hand: whatever size it claims, whatever chunks it carries."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def reason_of(source: bytes | Path, max_pixels: int = MAX_PIXELS) -> Reason:
    with pytest.raises(BadImage) as caught:
        open_image(source, max_pixels)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def labels_of(dataset: Dataset, indices: Iterable[int]) -> list[int]:
    labels = dataset.batch(list(indices), (8, 8)).labels
    assert labels is not None and labels.dtype == np.int64
    return labels.tolist()


def captions_of(dataset: Dataset, indices: Iterable[int]) -> list[str]:
    captions = dataset.batch(list(indices), (8, 8)).captions
    assert captions is not None
    return captions


# ---- one picture: modes


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF"]
)
def test_common_formats_give_rgb(kind):
    pixels = open_image(encode(flat(RED, (16, 16)), kind))
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    assert np.abs(pixels[8, 8].astype(int) - RED).max() <= 6


def palette_with_transparency() -> bytes:
    image = flat(0, mode="P")
    image.putpalette([*RED, *BLACK])
    return encode(image, transparency=0)


AS_COLOUR = {
    "palette": (lambda: encode(flat(RED).convert("P", palette=Image.Palette.ADAPTIVE)), RED),
    "palette, transparent": (palette_with_transparency, WHITE),
    "RGBA opaque": (lambda: encode(flat((*RED, 255), mode="RGBA")), RED),
    "RGBA clear": (lambda: encode(flat((0, 0, 0, 0), mode="RGBA")), WHITE),
    "RGBA half": (lambda: encode(flat((0, 0, 0, 128), mode="RGBA")), (127, 127, 127)),
    "LA half": (lambda: encode(flat((0, 128), mode="LA")), (127, 127, 127)),
    "RGB with a transparent colour": (lambda: encode(flat(RED), transparency=RED), WHITE),
    "CMYK": (lambda: encode(flat((0, 255, 255, 0), mode="CMYK"), "TIFF"), RED),
    "CMYK JPEG": (lambda: encode(flat((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=100), (254, 0, 0)),
    "grey": (lambda: encode(flat(77, mode="L")), (77, 77, 77)),
    "1 bit": (lambda: encode(flat(1, mode="1")), WHITE),
    "16 bit PNG": (lambda: encode(flat(32896, mode="I;16")), (128, 128, 128)),
    "16 bit TIFF": (lambda: encode(flat(65535, mode="I;16"), "TIFF"), WHITE),
    "16 bit PGM": (lambda: b"P5 1 1 65535\n\x80\x80", (128, 128, 128)),
    "float TIFF to 1": (lambda: encode(flat(0.5, mode="F"), "TIFF"), (128, 128, 128)),
    "float TIFF to 255": (lambda: encode(flat(100.0, mode="F"), "TIFF"), (100, 100, 100)),
    "float TIFF to 65535": (lambda: encode(flat(65535.0, mode="F"), "TIFF"), WHITE),
    "YCbCr JPEG": (lambda: encode(flat((90, 90, 90)), "JPEG", quality=100), (90, 90, 90)),
    "one pixel": (lambda: encode(flat(RED, (1, 1))), RED),
}


@pytest.mark.parametrize("name", AS_COLOUR)
def test_every_mode_gives_its_colour(name):
    make, colour = AS_COLOUR[name]
    pixels = open_image(make())
    assert pixels.ndim == 3 and np.abs(pixels.astype(int) - colour).max() <= 1


def test_signed_and_deep_greys_are_stretched():
    values = np.array([[-50.0, 0.0, 50.0]], np.float32)
    assert open_image(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    deep = Image.fromarray(np.array([[0, 100_000, 200_000]], np.int32))
    assert open_image(encode(deep, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


def test_floats_that_are_not_numbers_are_refused():
    bad = Image.fromarray(np.array([[0.5, np.nan]], np.float32))
    assert reason_of(encode(bad, "TIFF")) == Reason.UNDECODABLE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = RED  # the corner tells all eight orientations apart together with the shape
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposes from upright to stored
    stored = Image.fromarray(upright)
    if orientation != 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(open_image(encode(stored, exif=exif)), upright)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame_and_are_counted(kind, tmp_path):
    report = Report()
    frames = encode(flat(RED), kind, save_all=True, append_images=[flat(BLACK), flat(WHITE)])
    (tmp_path / "moving").write_bytes(frames)
    pixels = open_image(tmp_path / "moving", report=report)
    assert np.abs(pixels.astype(int) - RED).max() <= 6
    assert report.counts == {"animated: first frame used": 1}
    still = Report()
    open_image(encode(flat(RED), kind), report=still)
    assert still.counts == {}


def test_large_jpeg_is_decoded_small_yet_covers_twice_the_side():
    photo = encode(noise(800, 640), "JPEG")
    assert open_image(photo).shape == (640, 800, 3)
    assert open_image(photo, cover=(64, 64)).shape == (160, 200, 3)


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "RGB", "P"])
def test_large_pictures_are_converted_a_strip_at_a_time(mode):
    """Beside the picture as decoded, which Pillow holds, there is little more than the pixels returned."""
    side = 3000
    picture = encode(Image.new(mode, (side, side)))
    tracemalloc.start()
    pixels = open_image(picture)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * pixels.nbytes, f"{peak / side**2:.1f} bytes a pixel"


def varied(mode: str, **options: object) -> bytes:
    """A picture of noise in this mode, stored without loss; deep greys of both signs where they have one."""
    rng = np.random.default_rng(0)
    deep = {"I;16": "uint16", "I;16B": ">u2", "I": "int32", "F": "float32"}
    if mode in deep:
        image = Image.fromarray((rng.normal(size=(7, 5)) * 9000).astype(np.int32).astype(deep[mode]))
    else:
        image = Image.fromarray(rng.integers(0, 256, (7, 5, 4), np.uint8)).convert(mode)
    return encode(image, "TIFF" if mode in (*deep, "CMYK", "LAB") else "PNG", **options)


VARIED = {mode: varied(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB")}
VARIED |= {mode: varied(mode) for mode in ("I;16", "I;16B", "I", "F")}
VARIED["P, transparent"] = varied("P", transparency=3)


@pytest.mark.parametrize("name", VARIED)
def test_strips_change_nothing(name, monkeypatch):
    whole, opaque = open_image(VARIED[name]), open_alpha(VARIED[name])
    assert whole.std() > 10
    monkeypatch.setattr(images_module, "STRIP_PIXELS", 10)
    assert np.array_equal(open_image(VARIED[name]), whole)
    assert np.array_equal(open_alpha(VARIED[name]), opaque)  # type: ignore[arg-type]


# ---- one picture: refusals


def test_not_a_picture_empty_and_truncated():
    assert reason_of(b"") == Reason.EMPTY
    assert reason_of(b"hello, this is no picture") == Reason.NOT_A_PICTURE
    for kind in ("PNG", "JPEG", "BMP"):
        whole = encode(noise(), kind)
        assert reason_of(whole[: len(whole) // 2]) == Reason.TRUNCATED
    assert reason_of(png(50, 50, data=b"\0" * 99)) == Reason.TRUNCATED


def test_size_is_judged_by_the_header():
    assert reason_of(encode(noise(40, 30)), max_pixels=1199) == Reason.TOO_LARGE
    open_image(encode(noise(40, 30)), max_pixels=1200)
    assert reason_of(encode(noise(40, 30), "JPEG"), max_pixels=1199) == Reason.TOO_LARGE


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [60_000, 10_000, 2**31 - 1])
def test_pictures_that_claim_to_be_enormous(side):
    assert reason_of(png(side, side)) == Reason.TOO_LARGE
    webp = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + b"\0" * 8
    assert reason_of(webp) in (Reason.TOO_LARGE, Reason.UNDECODABLE, Reason.NOT_A_PICTURE)


@pytest.mark.parametrize("chunk", [b"zTXt", b"iTXt", b"iCCP"])
def test_compressed_chunks_that_explode_do_no_harm(chunk):
    bomb = zlib.compress(b"\0" * (80 << 20), 9)
    before = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"icc\0\0"}[chunk]
    pixels = b"".join(b"\0" + b"\0" * 6 for _ in range(2))
    data = png(2, 2, *[(chunk, before + bomb)] * 3, data=pixels)
    try:
        assert open_image(data).shape == (2, 2, 3)
    except BadImage as error:
        assert error.reason == Reason.UNDECODABLE


def test_files_longer_than_any_picture_are_not_read(tmp_path):
    path = tmp_path / "sparse.webp"
    with open(path, "wb") as file:
        file.write(encode(noise(), "WEBP"))
        file.truncate(1 << 40)
    assert reason_of(path) == Reason.TOO_LARGE


def test_postscript_is_never_run():
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == Reason.NOT_A_PICTURE


def test_things_that_are_not_files(tmp_path):
    assert reason_of(tmp_path / "none.png") == Reason.MISSING
    (tmp_path / "folder.png").mkdir()
    assert reason_of(tmp_path / "folder.png") == Reason.NOT_A_FILE
    os.mkfifo(tmp_path / "pipe.png")
    assert reason_of(tmp_path / "pipe.png") == Reason.NOT_A_FILE
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    assert reason_of(tmp_path / "broken.png") == Reason.MISSING
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert reason_of(tmp_path / "loop.png") == Reason.MISSING


def test_permission_is_a_reason(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(encode(noise()))
    monkeypatch.setattr("builtins.open", refuse)
    assert reason_of(tmp_path / "a.png") == Reason.NO_PERMISSION


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_picture():
    assert open_image(encode(flat(RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).shape == (4, 6, 3)


SAMPLES = [
    encode(noise(24, 20), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "ICO")
]


def opens_or_names_a_reason(data: bytes) -> None:
    try:
        pixels = open_image(data, max_pixels=100_000, report=Report())
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    except BadImage as error:
        assert isinstance(error.reason, Reason)


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from([b"", *(sample[:12] for sample in SAMPLES)]), st.binary(max_size=300))
def test_random_bytes_never_crash(head, tail):
    opens_or_names_a_reason(head + tail)


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_pictures_never_crash(sample, data):
    damaged = bytearray(sample[: data.draw(st.integers(0, len(sample)))])
    for _ in range(data.draw(st.integers(0, 6))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    opens_or_names_a_reason(bytes(damaged))


# ---- fit


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_fit_gives_the_side_and_keeps_a_flat_colour(height, width, h, w, top, left):
    image = np.full((height, width, 3), (10, 200, 77), np.uint8)
    fitted = fit(image, (h, w), (top, left))
    assert fitted.shape == (h, w, 3) and (fitted == (10, 200, 77)).all()


def test_fit_is_resize_then_crop():
    """Against the two steps of the recipe, away from the borders, where a box sees less around it."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    image = smooth.resize((240, 180), Image.Resampling.BICUBIC)
    resized = image.resize((96, 72), Image.Resampling.LANCZOS)  # shorter side to 1.125 x 64
    expected = np.asarray(resized.crop((16, 4, 80, 68))).astype(int)
    fitted = fit(np.asarray(image), (64, 64)).astype(int)
    assert np.abs(fitted - expected)[3:-3, 3:-3].max() <= 3


def test_fit_crops_where_it_is_told():
    ramp = np.repeat(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, 0), 3, 2)
    left, right = (fit(ramp, (64, 64), (0.5, x)).mean() for x in (0.0, 1.0))
    assert right - left == pytest.approx(256 * (1 - 1 / 1.125), abs=2)
    down = fit(ramp.transpose(1, 0, 2).copy(), (64, 64), (1.0, 0.0))
    assert down.mean() == pytest.approx(right, abs=0.5)


def test_fit_keeps_prepared_pictures_and_stands_extreme_shapes():
    prepared = np.asarray(noise(32, 32))
    assert fit(prepared, (32, 32)) is prepared
    assert fit(np.zeros((1, 100_000, 3), np.uint8), (64, 64)).shape == (64, 64, 3)


# ---- split and report


def test_split_is_stable_when_items_are_added():
    names = [f"{n}.png" for n in range(2000)]
    few, many = hash_split(names[:1000]), hash_split(names)
    assert many[:1000] == few
    assert abs(sum(many) - 200) < 5 * np.sqrt(2000 * 0.1 * 0.9)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 30])
def test_split_of_few(count):
    for start in range(20):
        held = sum(hash_split([f"{start}-{n}" for n in range(count)]))
        assert held == 0 if count < 10 else 1 <= held < count


def test_split_keeps_equal_keys_together():
    held = hash_split(["a", "b", "c", "d"] * 5)
    assert 1 <= sum(held[:4]) < 4 and held == held[:4] * 5
    assert not any(hash_split(["a"] * 50))


def test_report_is_one_line_with_three_names():
    report = Report()
    assert str(report) == "nothing skipped"
    for n in range(5):
        report.add("truncated", f"{n}\n\udcff.png")
    report.add("empty", "e.png")
    assert str(report) == (
        "5 truncated (0\\n\\udcff.png, 1\\n\\udcff.png, 2\\n\\udcff.png, ...); 1 empty (e.png)"
    )


# ---- folder


def write(path: Path, data: bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(noise(seed=len(path.name))) if data is None else data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_folder_counts_what_it_leaves_out(tmp_path):
    for n in range(3):
        write(tmp_path / f"good{n}.png")
    write(tmp_path / "empty.png", b"")
    write(tmp_path / "text.jpg", b"not a picture at all")
    write(tmp_path / "huge.png", png(60_000, 60_000))
    write(tmp_path / ".hidden.png")
    write(tmp_path / ".git/x.png")
    write(tmp_path / "notes.md", b"ignored")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as unix:
        cwd = os.getcwd()
        os.chdir(tmp_path)  # socket paths are short
        unix.bind("socket.png")
        os.chdir(cwd)
    (tmp_path / "broken.png").symlink_to("gone.png")
    (tmp_path / "again").symlink_to(tmp_path)
    dataset = ImageFolder(tmp_path)
    assert dataset.keys == ["good0.png", "good1.png", "good2.png"]
    assert dataset.report.counts == {
        "empty": 1,
        "not a picture": 1,
        "too large": 1,
        "not a regular file": 2,
        "missing": 1,
        "linked folder not entered": 1,
    }
    assert dataset.report.examples["too large"] == ["huge.png"]
    batch = dataset.batch([2, 0], (16, 24))
    assert batch.images.shape == (2, 16, 24, 3) and batch.labels is None and batch.captions is None
    assert dataset.batch([], (16, 24)).images.shape == (0, 16, 24, 3)


def test_folder_labels_are_its_first_level(tmp_path):
    for name in ("b/x.png", "a/deep/y.png", "a/z.PNG"):
        write(tmp_path / name)
    dataset = ImageFolder(tmp_path)
    assert dataset.class_names == ["a", "b"]
    assert labels_of(dataset, range(3)) == [0, 0, 1]
    assert dataset.report.counts == {}


def test_pictures_beside_class_folders_switch_classes_off_and_say_so(tmp_path):
    for name in ("a/x.png", "b/x.png", "stray.png"):
        write(tmp_path / name)
    dataset = ImageFolder(tmp_path)
    assert dataset.class_names is None and dataset.batch([0], (8, 8)).labels is None
    assert str(dataset.report) == "1 picture beside the class folders: no classes (stray.png)"
    write(tmp_path / "a/x.txt", b"a cat")  # captions are used in place of classes: nothing is lost
    assert ImageFolder(tmp_path).report.counts == {FolderReason.NO_CAPTION: 2}
    (tmp_path / "a/x.txt").unlink()
    write(tmp_path / "stray.png", b"nothing")
    assert ImageFolder(tmp_path).class_names == ["a", "b"]


def test_broken_picture_is_replaced_by_its_neighbour_of_the_same_split(tmp_path):
    whole = encode(noise())
    for n in range(40):
        write(tmp_path / f"{n % 2}/{n:02}.png", encode(noise(seed=n)))
        write(tmp_path / f"{n % 2}/{n:02}.txt", f"number {n}\nsecond line".encode())
    train = ImageFolder(tmp_path).split("train")
    held_out = set(ImageFolder(tmp_path).split("validation").keys)
    assert held_out and not held_out & set(train.keys)
    broken = next(i for i, key in enumerate(train.keys) if ImageFolder(tmp_path).keys[i + 1] in held_out)
    write(tmp_path / train.keys[broken], whole[: len(whole) // 2])
    train = ImageFolder(tmp_path).split("train")
    for _ in range(2):
        batch = train.batch([broken, broken + 1], (8, 8))
        assert np.array_equal(batch.images[0], batch.images[1])
        captions, labels = captions_of(train, [broken, broken + 1]), labels_of(train, [broken, broken + 1])
        assert captions[0] == captions[1] and labels[0] == labels[1]
    assert train.report.counts == {"truncated": 1}
    assert train.report.examples["truncated"] == [train.keys[broken]]


def test_folder_where_nothing_decodes(tmp_path):
    whole = encode(noise())
    write(tmp_path / "a.png", whole[: len(whole) // 2])
    with pytest.raises(UserError, match="no picture .* can be decoded: 1 truncated"):
        ImageFolder(tmp_path).batch([0], (8, 8))


def test_captions_from_lists_and_texts(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png", "d.png"):
        write(tmp_path / name)
    write(tmp_path / "a.txt", b"\xef\xbb\xbf\n  a red \t cat \nmore")
    write(tmp_path / "b.txt", b"overridden")
    rows = [{"file_name": "b.png", "text": "a dog"}, {"file_name": "./sub/c.png", "caption": "two\nlines"}]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
    dataset = ImageFolder(tmp_path)
    assert captions_of(dataset, range(4)) == ["a red cat", "a dog", "", "two lines"]
    assert dataset.report.counts == {FolderReason.NO_CAPTION: 1}


def test_caption_suffixes_are_of_any_case(tmp_path):
    for name in ("Y.png", "Z.PNG", "sub/x.png"):
        write(tmp_path / name)
    write(tmp_path / "Y.txt", b"the one in small letters")
    write(tmp_path / "Y.TXT", b"the other one")
    write(tmp_path / "Z.TXT", b"a cat")
    write(tmp_path / "sub/x.Txt", b"a dog")
    write(tmp_path / "sub/Z.txt", b"of no picture")
    dataset = ImageFolder(tmp_path)
    assert captions_of(dataset, range(3)) == ["the one in small letters", "a cat", "a dog"]


def test_captions_that_are_not_utf_8_are_unreadable(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        write(tmp_path / name)
    write(tmp_path / "a.txt", "bad".encode("utf-16"))
    write(tmp_path / "b.txt", "un café".encode("latin-1"))
    write(tmp_path / "c.txt", "un café\n".encode() + b"\xff")  # only the first line is a caption
    assert captions_of(ImageFolder(tmp_path), range(4)) == ["", "", "un café", ""]
    rows = ['{"file_name": "a.png", "text": "caf\xe9"}', '{"file_name": "d.png", "text": "\\ud83d"}']
    write(tmp_path / "captions.jsonl", "\n".join(rows).encode("latin-1"))
    dataset = ImageFolder(tmp_path)
    assert captions_of(dataset, range(4)) == ["", "", "un café", ""]
    assert dataset.report.counts == {FolderReason.UNREADABLE: 4, FolderReason.NO_CAPTION: 3}
    assert dataset.report.examples[FolderReason.UNREADABLE] == ["a.txt", "b.txt", "captions.jsonl:1"]


def test_caption_files_cannot_leave_the_folder(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "b.png", "sub/c.png"):
        write(inside / name)
    write(outside / "secret.png")
    write(outside / "secret.txt", b"secret words")
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "b.txt").symlink_to(outside / "secret.txt")
    names = [
        str(inside / "a.png"),
        "../out/secret.png",
        "sub/../a.png",
        "link.png",
        "gone.png",
        "a\0.png",
        "a.png",
    ]
    lines = [json.dumps({"file_name": name, "caption": f"caption {n}"}) for n, name in enumerate(names)]
    lines += [
        "{",
        "[]",
        "[" * 5000,
        '{"file_name": 3, "text": "x"}',
        '{"file_name": "a.png"}',
        "x" * 200_000,
        "",
    ]
    write(inside / "captions.jsonl", "\n".join(lines).encode())
    dataset = ImageFolder(inside)
    assert captions_of(dataset, range(4)) == ["caption 6", "", "", ""]
    counts = dataset.report.counts
    assert counts[FolderReason.OUTSIDE] == 6  # five names, and the text that is a link
    assert counts[FolderReason.NO_PICTURE] == 1
    assert counts[FolderReason.UNREADABLE] >= 6
    assert "secret words" not in str(dataset.report)


def test_caption_pipe_does_not_hang(tmp_path):
    write(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "captions.jsonl")
    assert ImageFolder(tmp_path).report.counts == {FolderReason.UNREADABLE: 2}


def test_cache_is_bounded_and_changes_nothing(tmp_path, monkeypatch):
    for n in range(4):
        write(tmp_path / f"{n}.png", encode(noise(seed=n)))
    opened: list[str] = []

    def counted(path: Path, *args: Any, **kwargs: Any) -> np.ndarray:
        opened.append(path.name)
        return open_image(path, *args, **kwargs)

    monkeypatch.setattr(folder_module, "open_image", counted)
    one = 40 * 30 * 3
    dataset = ImageFolder(tmp_path, cache_bytes=2 * one + 1)
    first = dataset.batch(range(4), (16, 16)).images
    assert np.array_equal(dataset.batch(range(4), (16, 16)).images, first)
    assert opened == ["0.png", "1.png", "2.png", "3.png", "2.png", "3.png"]
    crops = np.array([[0.0, 1.0]])
    assert not np.array_equal(dataset.batch([0], (16, 16), crops).images[0], first[0])


def test_unusable_folders_say_so_in_one_line(tmp_path):
    write(tmp_path / "file.png")
    (tmp_path / "none").mkdir()
    write(tmp_path / "bad/a.png", b"nothing")
    for name, words in {
        "missing": "does not exist",
        "file.png": "is not a folder",
        "none": "no .jpg, .png",
        "bad": "all were skipped: 1 not a picture",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            ImageFolder(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_check_header_decodes_nothing():
    whole = encode(noise(), "JPEG")
    check_header(whole[: len(whole) // 2])


# ---- arrays


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW", "NHW1", "RGBA"])
@pytest.mark.parametrize("values", ["uint8", "unit", "signed"])
def test_array_layouts_and_ranges_agree(layout, values, tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (12, 8, 10, 3), np.uint8)
    rgb[0, 0, 0], rgb[0, 0, 1] = 0, 255
    opaque = np.full((12, 8, 10, 1), 255, np.uint8)
    stored = {
        "NHW": rgb[..., 0],
        "NHWC": rgb,
        "NCHW": rgb.transpose(0, 3, 1, 2),
        "NHW1": rgb[..., :1],
        "RGBA": np.concatenate([rgb, opaque], -1),
    }[layout]
    expected = rgb if layout in ("NHWC", "NCHW", "RGBA") else np.repeat(rgb[..., :1], 3, -1)
    if values == "unit":
        stored = (stored / 255).astype(np.float32)
    elif values == "signed":
        stored = stored / 127.5 - 1
    np.save(tmp_path / "a.npy", stored)
    dataset = open_array(tmp_path / "a.npy")
    batch = dataset.batch(range(12), (8, 10))
    assert np.array_equal(batch.images, expected) and batch.labels is None
    said = {"uint8": "nothing", "unit": "[0, 1]", "signed": "[-1, 1]"}[values]
    assert said in str(dataset.report)
    assert isinstance(dataset.images, np.memmap)


def test_array_transparency_is_on_white():
    clear = np.zeros((1, 2, 2, 4), np.uint8)
    assert (ArrayImages(clear).batch([0], (2, 2)).images == 255).all()


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("arr_0", "arr_1")])
def test_npz_with_labels_follows_the_split(keys, tmp_path):
    images = np.arange(60, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", **dict(zip(keys, (images, np.arange(60)), strict=True)))
    dataset = open_dataset(str(tmp_path / "a.npz"))
    assert isinstance(dataset, ArrayImages)
    train, validation = dataset.split("train"), dataset.split("validation")
    assert len(train) + len(validation) == 60 and 1 <= len(validation) <= 20
    labels = labels_of(validation, range(len(validation)))
    assert validation.batch(range(len(validation)), (4, 4)).images[:, 0, 0, 0].tolist() == labels
    assert not set(labels) & set(labels_of(train, range(len(train))))


def test_labels_of_an_array_are_its_classes():
    images = np.zeros((4, 4, 4), np.uint8)
    dataset = ArrayImages(images, np.array([2, 0, 2, 1], np.uint8))
    assert dataset.class_names == ["0", "1", "2"] and dataset.report.counts == {}
    assert dataset.take([0, 1]).class_names == ["0", "1", "2"]
    assert ArrayImages(images).class_names is None
    from_one = ArrayImages(images, np.array([1, 2, 6, 2]))
    assert from_one.class_names == ["0", "1", "2", "3", "4", "5", "6"]
    assert str(from_one.report) == "4 class without a picture (0, 3, 4, ...)"


@pytest.mark.parametrize("label", [-1, 100_000, 2**40, 2**64 - 1])
def test_labels_that_cannot_be_classes_are_refused(label):
    ArrayImages(np.zeros((2, 4, 4), np.uint8), np.array([0, 99_999]))
    with pytest.raises(
        UserError, match=f"a.npz has the label {label}; .* 0 to 99999; number .* from 0"
    ) as caught:
        labels = np.array([0, label], np.int64 if label < 2**63 else np.uint64)
        ArrayImages(np.zeros((2, 4, 4), np.uint8), labels, "a.npz")
    assert "\n" not in str(caught.value)


BAD_ARRAYS: dict[str, tuple[np.ndarray, str]] = {
    "two dimensions": (np.zeros((4, 4)), "shape"),
    "five channels": (np.zeros((2, 4, 4, 5)), "shape"),
    "empty": (np.zeros((0, 4, 4)), "empty"),
    "uint16": (np.zeros((2, 4, 4), np.uint16), "uint16; .* scale them to 0 to 255"),
    "text": (np.full((2, 4, 4), "a"), "type"),
    "objects": (np.full((2, 4, 4), None), "pickled"),
    "not a number": (np.full((2, 4, 4), np.nan), "NaN"),
    "floats to 255": (np.full((2, 4, 4), 200.0), "uint8"),
    "infinite": (np.full((2, 4, 4), np.inf), "floats"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_bad_arrays_say_what_is_allowed(name, suffix, tmp_path):
    array, words = BAD_ARRAYS[name]
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, array, allow_pickle=True)
    else:
        np.savez(path, images=array)
    with pytest.raises(UserError, match=words) as caught:
        open_array(path)
    assert "\n" not in str(caught.value)


def test_bad_array_files(tmp_path):
    images = np.zeros((3, 4, 4), np.uint8)
    np.save(tmp_path / "whole.npy", images)
    whole = (tmp_path / "whole.npy").read_bytes()
    for name, data in {
        "empty.npy": b"",
        "noise.npz": b"PK\3\4junk",
        "cut.npy": whole[:-5],
        "head.npy": whole[:20],
    }.items():
        write(tmp_path / name, data)
        with pytest.raises(UserError, match="not a readable array"):
            open_array(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(UserError, match="not a file"):
        open_array(tmp_path / "pipe.npy")
    np.savez(tmp_path / "other.npz", pictures=images)
    with pytest.raises(UserError, match="it has pictures"):
        open_array(tmp_path / "other.npz")
    for labels in (np.zeros(2, int), np.zeros(3)):
        np.savez(tmp_path / "labels.npz", images=images, labels=labels)
        with pytest.raises(UserError, match="3 whole numbers"):
            open_array(tmp_path / "labels.npz")


def test_npz_bomb_is_refused_before_unpacking(tmp_path, monkeypatch):
    monkeypatch.setattr("varkit.data.arrays.MAX_NPZ_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((2, 1024, 1024), np.uint8))
    with pytest.raises(UserError, match="unpacks to"):
        open_array(tmp_path / "bomb.npz")


# ---- bundled and installed sources


def test_digits():
    pytest.importorskip("sklearn")
    digits = Digits()
    assert len(digits) == 1797 and digits.class_names == list("0123456789")
    batch = digits.batch([0, 1, 1796], (8, 8))
    assert labels_of(digits, [0, 1, 1796]) == [0, 1, 8] and batch.images.max() == 255
    assert np.array_equal(batch.images[..., 0], batch.images[..., 2])
    assert digits.batch([0], (20, 36)).images.shape == (1, 20, 36, 3)
    train, validation = digits.split("train"), digits.split("validation")
    assert (len(train), len(validation)) == (1545, 252)
    for first, count in ((0, 10), (122, 30)):  # where each of the two writers begins
        assert labels_of(validation, range(first, first + count)) == list(range(10)) * (count // 10)


def test_photographs_are_held_out_whole():
    pytest.importorskip("skimage")
    photographs = Photographs(patches_each=4)
    train, validation = photographs.split("train"), photographs.split("validation")
    assert not set(train.keys) & set(validation.keys) and len(set(validation.keys)) >= 1
    indices = range(0, len(photographs), 3)
    first, second = (
        photographs.batch(indices, (32, 48)).images,
        Photographs(4).batch(indices, (32, 48)).images,
    )
    assert np.array_equal(first, second) and first.shape[1:] == (32, 48, 3)
    assert len({image.tobytes() for image in photographs.batch(range(4), (32, 32)).images}) == 4
    assert photographs.report.counts == {}


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for source in (Digits, Photographs):
        with pytest.raises(UserError, match=r"pip install varkit\[data\]"):
            source()


def test_emoji():
    try:
        find_font()
    except UserError:
        pytest.skip("no colour emoji font is installed")
    emoji = Emoji()
    assert len(emoji) > 1000 and len(set(emoji.keys)) == len(emoji)
    apple = emoji.keys.index("red apple")
    batch = emoji.batch([apple, 0], (32, 48))
    assert captions_of(emoji, [apple]) == ["red apple"] and batch.labels is None
    corner, centre = batch.images[0, 0, 0], batch.images[0, 16, 24].astype(int)
    assert corner.tolist() == [255, 255, 255] and centre[0] - centre[2] > 80
    assert "ideographic space" not in emoji.keys
    validation = emoji.split("validation")
    assert 0.05 < len(validation) / len(emoji) < 0.15
    assert captions_of(validation, [3]) == [validation.keys[3]]


def test_missing_emoji_font_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr("varkit.data.emoji.FONT_NAMES", ("NoSuchFont.ttf",))
    monkeypatch.delenv("VARKIT_EMOJI_FONT", raising=False)
    with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
        Emoji()
    monkeypatch.setenv("VARKIT_EMOJI_FONT", str(tmp_path / "none.ttf"))
    with pytest.raises(UserError, match="none.ttf is not a font"):
        Emoji()


# ---- by name


def test_open_dataset(tmp_path):
    pytest.importorskip("sklearn")
    assert isinstance(open_dataset("digits"), Digits)
    write(tmp_path / "pictures.npy/a.png")  # a folder, whatever it is called
    assert isinstance(open_dataset(str(tmp_path / "pictures.npy")), ImageFolder)
    with pytest.raises(UserError, match="did you mean 'digits'"):
        open_dataset("digit")
    with pytest.raises(UserError, match="does not exist"):
        open_dataset(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="does not exist"):
        open_dataset("gone.npz")
    with pytest.raises(UserError, match="unknown part 'test'"):
        Digits().split("test")  # type: ignore[arg-type]


def test_digits_are_shifted_where_others_are_cropped():
    digits = Digits()
    plain = digits.batch([5], (32, 32)).images
    middle = digits.batch([5], (32, 32), np.array([[0.5, 0.5]])).images
    moved = digits.batch([5], (32, 32), np.array([[0.5, 1.0]])).images
    assert np.array_equal(plain, middle) and not np.array_equal(plain, moved)
    ink = [np.average(np.arange(32), weights=picture[0, ..., 0].sum(0)) for picture in (plain, moved)]
    assert 2 < ink[0] - ink[1] < 4, "three quarters of a pixel are three of the 32"
