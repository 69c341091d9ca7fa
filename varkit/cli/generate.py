"""`varkit generate`: captions or labels to pictures."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from varkit.cli.console import progress
from varkit.cli.models import DEFAULT_MODEL, opened
from varkit.cli.run_record import claim, model_digest, prompts_digest, settle, words_digest
from varkit.cli.sampling import Ordered, parse_size
from varkit.cli.words import Words
from varkit.errors import UserError
from varkit.files import atomic_write, ensure_writable, write_json

if TYPE_CHECKING:
    from PIL import Image

    from varkit.hub.pipeline import Pipeline

Job = tuple[int, str | int]
"""A picture's number, and its prompt."""

Drawn = tuple[int, "Image.Image", "Image.Image | None"]
"""A picture's number, the picture, and the strip of its previews if wanted."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".svg")
"""What nobody means a folder by."""

MOST = 1_000_000
"""Pictures of one run, whose names are made beforehand."""


@dataclass(frozen=True)
class Generate(Words, Ordered):
    """Make pictures from a caption, a label, or a file of prompts."""

    caption: Positional[str | None] = None
    """What to draw, for a text model; the name of a class, for a class model."""
    model: str = DEFAULT_MODEL
    """A bundled model, a saved folder, a training's output folder, a folder of published files, or OWNER/NAME or
    OWNER/NAME:VARIANT on the Hugging Face hub."""
    label: int | None = None
    """What to draw, for a class model: a label."""
    prompts: Path | None = None
    """A text file with one prompt a line."""
    negative: str | None = None
    """What guidance leads away from: a caption, or a class; by default away from nothing in particular."""
    n: int = 1
    """Pictures for each prompt."""
    batch: int = 8
    """Pictures drawn together."""
    seed: int = 0
    """Seed; picture i draws from sample i of it."""
    size: str | None = None
    """HEIGHTxWIDTH in pixels, if the model makes several."""
    out: Path | None = None
    """FILE.png (n > 1 writes FILE-0.png ...) or a folder; by default names made from the prompts."""
    shard: str | None = None
    """I/N: draw only the pictures whose number leaves I when divided by N, so that N processes or machines share the
    work; the pictures are the same for any N."""
    resume: bool = False
    """Leave whole pictures that are there as they are, and draw the others; with --previews also missing strips."""
    ray: str | None = None
    """Let Ray's workers draw, the same pictures: "local" starts some here, "auto" or an address joins a cluster."""
    grid: bool = False
    """Write one picture with all of them."""
    previews: bool = False
    """Also write a strip of each picture as it grew, step by step (NAME-previews.png)."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, ...; by default CUDA's first device if there is one."""
    dtype: str | None = None
    """Compute in float32, bfloat16 or float16; by default as the model was saved."""
    offload: Literal["disk", "ram"] | None = None
    """Keep the generator's blocks on disk or in RAM until their turn, for a model larger than memory."""
    packed: bool = False
    """Lay the weights out for oneDNN first: faster on CPUs where few rows meet large weights, at twice the memory."""
    tile: int | None = None
    """Decode pictures in tiles of so many pixels a side, for large ones in little memory."""

    def __post_init__(self) -> None:
        self.check_words()
        self.check_order(self.size)
        if self.packed and self.offload is not None:
            raise UserError(
                "--packed keeps a second copy of weights that --offload keeps none of; leave one out"
            )
        for name in ("n", "batch"):
            check_count(name, getattr(self, name))
        if self.out is not None and self.out.suffix.lower() in OTHER_PICTURES:
            check_picture_name(self.out)

    def run(self) -> None:
        """Write the pictures and print their paths."""
        prompts = self._prompts()
        if len(prompts) * self.n > MOST:
            raise UserError(
                f"{len(prompts)} prompts with --n {self.n} are {len(prompts) * self.n} pictures; a run draws up to "
                f"{MOST}: split the prompts, or give runs a smaller --n and a --seed each"
            )
        targets = self._targets(prompts)
        share = parse_shard(self.shard)
        if self.grid and (self.shard or self.resume or self.ray):
            raise UserError(
                "--grid needs all pictures at once; leave out --shard, --resume and --ray, or --grid"
            )
        check_targets(targets)

        asked = prompts if self.negative is None else [*prompts, self.negative]
        # A mistake in the last prompt shows before the first is drawn.
        pipeline = self.opened().reading(asked)
        jobs = list(enumerate(pipeline.jobs(prompts, self.n)))
        alike = self._alike(len(jobs))
        strip_targets = self._strip_targets(prompts)
        if not self.grid:
            record = self._record(prompts)
            # A few pictures that cannot be shared out leave no file beside themselves.
            facts = self._facts(pipeline, prompts) if alike else {}
            claimed = claim(record, facts, targets, self.resume) if alike else None
            finished = {i for i, _ in jobs[share] if self.resume and is_whole(targets[i])}
            shown = {i for i in finished if not self.previews or is_whole(strip_targets[i])}
            left = [job for job in jobs[share] if job[0] not in shown]
            for number, image, strip in self._drawn(pipeline, left, alike):
                if claimed is not None:  # not before: what fails at the first picture leaves nothing
                    write_json(record, claimed)
                    claimed = None
                if strip is not None:
                    save_picture(strip, strip_targets[number])
                # At once: what is drawn is not lost when the rest is interrupted.
                if number not in finished:
                    save_picture(image, targets[number])
            if alike and len(left) == len(jobs):
                settle(record, facts)
            return

        from varkit.pictures import grid

        _, images, strips = zip(*self._drawn(pipeline, jobs, alike), strict=True)
        save_picture(grid(images, columns=min(len(images), 8 if self.n == 1 else self.n)), targets[0])
        for strip_path, strip in zip(strip_targets, strips, strict=True):
            if strip is not None:
                save_picture(strip, strip_path)

    def _record(self, prompts: Sequence[str | int]) -> Path:
        """Where it is told what the pictures are of: a hidden file, since folders of pictures are read as such."""
        out = self._out(prompts)
        return out.with_name(f".{out.stem}.json") if is_file(out) else out / ".generate.json"

    def _facts(self, pipeline: "Pipeline", prompts: Sequence[str | int]) -> dict[str, Any]:
        """What the pictures' bytes depend on, on machines of one kind."""
        from varkit.hub.config import to_json

        asked = prompts if self.negative is None else [*prompts, self.negative]
        words = None if pipeline.how.text is None else words_digest(pipeline.how.text, asked)
        return {
            "model": model_digest(pipeline),
            "seed": self.seed,
            "prompts": prompts_digest(prompts),
            "n": self.n,
            "negative": self.negative,
            "dtype": str(next(pipeline.generator.parameters()).dtype).removeprefix("torch."),
            "batch": self.batch,
            "text_encoder": words if self.text_encoder else None,
            "embeddings": words if self.embeddings else None,
            "clean_prompts": self.clean_prompts,
            "tile": self.tile,
            "packed": self.packed,
            **to_json(pipeline.chosen(self.chosen())),
        }

    def opened(self) -> "Pipeline":
        """The model, as the options want it."""
        size = parse_size(self.size)

        from varkit.devices import find_device

        device = find_device(self.device)
        pipeline = opened(self.model, self.dtype, self.offload).to(device).sized(size)
        pipeline = self.in_order(pipeline)
        if self.tile is not None:
            pipeline.tiled(self.tile)
        if self.packed:
            pipeline.packed()
        return self.with_words(pipeline, self.dtype, self.device)

    def _alike(self, count: int) -> bool:
        """Whether all batches of a run over `count` pictures have one size, since sums round differently in another.

        They have wherever there are several, and for lists of prompts, which may be shared out: with --shard and
        --resume their pictures are those without.
        """
        shared = self.prompts is not None or self.shard is not None or self.resume
        return shared or count > self.batch

    def _drawn(self, pipeline: "Pipeline", jobs: Sequence[Job], alike: bool) -> Iterator[Drawn]:
        if self.ray is None:
            return draw(pipeline, jobs, self, alike)
        from varkit.cli.ray_data import draw_on_ray

        return draw_on_ray(pipeline, jobs, self, alike)

    def _prompts(self) -> list[str | int]:
        given = [name for name in ("caption", "label", "prompts") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} were given; give one of a caption, --label or --prompts")
        if self.prompts is not None:
            return read_prompts(self.prompts)
        if self.label is not None:
            return [self.label]
        if self.caption is not None:
            return [self.caption]
        if self.embeddings is None:
            raise UserError("nothing to draw was given; add a caption, --label N or --prompts FILE")
        return [prompt for prompt in self.stored.prompts if prompt != self.negative]

    def _targets(self, prompts: Sequence[str | int]) -> list[Path]:
        return self._paths(prompts, single=self.grid)

    def _strip_targets(self, prompts: Sequence[str | int]) -> list[Path]:
        return [p.with_name(f"{p.stem}-previews.png") for p in self._paths(prompts, single=False)]

    def _out(self, prompts: Sequence[str | int]) -> Path:
        """--out; else a name from the only prompt, or this folder, in which pictures are named by theirs."""
        if self.out is not None:
            return self.out
        return Path(f"{slug(prompts[0])}.png") if self.grid or len(prompts) == 1 else Path()

    def _paths(self, prompts: Sequence[str | int], single: bool) -> list[Path]:
        count = 1 if single else len(prompts) * self.n
        out = self._out(prompts)
        if not is_file(out):
            if single:
                return [out / "grid.png"]
            jobs = [(i, p) for i, p in enumerate(p for p in prompts for _ in range(self.n))]
            return [out / f"{i:0{len(str(count - 1))}d}-{slug(p)}.png" for i, p in jobs]
        if count == 1:
            return [out]
        return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)]


def read_prompts(file: Path) -> list[str | int]:
    """The lines of a text file that are not empty."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(file)!r} is not a text in UTF-8 ({error.reason}); write one prompt a line"
        ) from error
    if "\0" in text:
        raise UserError(f"{str(file)!r} is not a text: it has zero bytes; write one prompt a line")
    found: list[str | int] = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise UserError(f"{str(file)!r} has no prompt; write one a line")
    return found


def draw(pipeline: "Pipeline", jobs: Sequence[Job], options: Generate, alike: bool) -> Iterator[Drawn]:
    """The picture of each (number, prompt), as its batch is finished; shows a progress bar.

    alike: the last batch is filled up, so that all have one size.
    """
    from varkit.decode.loop import decode
    from varkit.pictures import grid

    chosen, previews = pipeline.chosen(options.chosen()), options.previews
    filled = list(jobs)
    if alike:
        filled += filled[-1:] * (-len(jobs) % options.batch)
    prompts, numbers = [prompt for _, prompt in filled], [number for number, _ in filled]
    left = len(jobs)
    with progress("drawing", left) as advance:
        for start in pipeline.starts(prompts, options.seed, options.batch, chosen, numbers, options.negative):
            wanted = [stream.sample for stream in start.draws.streams[:left]]
            left -= len(wanted)
            frames = [
                pipeline.pictures(state)
                for state in decode(pipeline.model, start)
                if previews or bool(state.finished.all())
            ]
            advance(len(wanted))
            for number, *grown in zip(wanted, *frames, strict=False):
                yield number, grown[-1], grid(grown, columns=len(grown)) if previews else None


def save_picture(image: "Image.Image", path: Path) -> None:
    """Write a picture by atomic rename and print its path."""
    with atomic_write(path) as part:
        image.save(part)
    print(path)


def is_whole(path: Path) -> bool:
    """Whether a file is a picture to its end; one that was copied in part is not, nor an empty one."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.format == "PNG":  # it has check sums and an end, so it need not be decoded
                picture.verify()
            else:
                picture.load()
    except Exception:  # a damaged file raises whatever its reader stumbles over
        return False
    return True


def is_file(out: Path) -> bool:
    """Whether --out names a picture, in place of a folder."""
    return out.suffix.lower() in PICTURES


def check_picture_name(out: Path) -> None:
    """Raise `UserError` for a file that no picture can be written to."""
    if not is_file(out):
        raise UserError(
            f"{str(out)!r} does not end as a picture does; end it in one of {', '.join(PICTURES)}"
        )


def check_targets(targets: Sequence[Path]) -> None:
    """Raise `UserError` unless pictures can be written to all of these."""
    for target in targets:
        if target.is_dir():
            raise UserError(f"{str(target)!r} is a folder; choose another --out, or remove it")
    for target in {target.parent: target for target in targets}.values():  # once a folder: it is probed
        ensure_writable(target)


def check_count(name: str, count: int) -> None:
    """Raise `UserError` for what is no number of pictures; `name` is the option's."""
    if not 1 <= count <= MOST:
        raise UserError(f"--{name} is {count}; ask for 1 to {MOST} pictures")


def slug(prompt: str | int) -> str:
    """A short file name made from a prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", str(prompt).lower()).strip("-")
    return words[:60].strip("-") or "picture"


def parse_shard(text: str | None) -> slice:
    """I/N -> every N-th from the I-th on. Raises `UserError` for anything else."""
    if text is None:
        return slice(None)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--shard {text!r} is not I/N with I from 0 to N - 1; write e.g. 0/4")
    return slice(int(found[1]), None, int(found[2]))
