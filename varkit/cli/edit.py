"""`varkit edit`: draw part of a picture anew, more of it around, or the same one finer."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from varkit.cli.generate import check_count, check_picture_name, check_targets, save_picture
from varkit.cli.models import DEFAULT_MODEL, opened
from varkit.cli.sampling import Ordered, parse_size
from varkit.cli.words import Words
from varkit.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Edit(Words, Ordered):
    """Draw part of a picture anew: in-painting, out-painting, or another class in its place."""

    picture: Positional[Path]
    """The picture to edit."""
    caption: Positional[str | None] = None
    """What the new picture shows, for a text model; the name of a class, for a class model."""
    label: int | None = None
    """What to draw, for a class model: a label. Without caption and label the model is not told."""
    mask: Path | None = None
    """A picture whose white parts are redrawn; same size as the picture."""
    box: tuple[float, float, float, float] | None = None
    """Y0 X0 Y1 X1, in fractions of the picture: redraw inside the box."""
    outside: bool = False
    """Redraw outside the box instead (out-painting)."""
    refine: bool = False
    """The picture is small: draw it at the model's size, or at --size (for a FlexVAR)."""
    size: str | None = None
    """HEIGHTxWIDTH in pixels: without mask or box, draw more around the picture up to this size (for a FlexVAR)."""
    place: tuple[float, float] | None = None
    """Y X: where in the larger picture this one lies, from 0 0 (top left) to 1 1 (bottom right); by default amid it."""
    raw: bool = False
    """Keep the tokenizer's version of the kept parts, instead of the original pixels."""
    model: str = DEFAULT_MODEL
    """A bundled model, a saved folder, or a training's output folder."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, ...; by default CUDA's first device if there is one."""
    n: int = 1
    """Versions to draw."""
    seed: int = 0
    """Seed of the first version's stream."""
    out: Path | None = None
    """FILE.png (n > 1 writes FILE-0.png ...); by default NAME-edited.png beside the picture."""

    def __post_init__(self) -> None:
        whole = self.refine or self.size is not None
        if whole and (self.mask or self.box):
            raise UserError("--refine and --size are about the whole picture; leave --mask and --box out")
        if not whole and (self.mask is None) == (self.box is None):
            given = "both --mask and --box were" if self.mask else "neither --mask nor --box was"
            raise UserError(f"{given} given; say with one of them what is redrawn")
        if self.outside and self.box is None:
            raise UserError("--outside goes with --box; with --mask, invert the mask picture")
        if self.place is not None and (self.refine or self.size is None):
            raise UserError(
                "--place is for drawing more around a picture; add --size, and leave --refine out, or leave it out"
            )
        self.check_words()
        self.check_order(self.size)
        if self.caption is not None and self.label is not None:
            raise UserError(f"caption {self.caption!r} and label {self.label} were given; give one of them")
        check_count("n", self.n)

    def run(self) -> None:
        """Write the edited pictures and print their paths."""
        out = self.out or self.picture.with_name(f"{self.picture.stem}-edited.png")
        check_picture_name(out)
        targets = (
            [out] if self.n == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(self.n)]
        )
        check_targets(targets)

        from PIL import Image

        from varkit.data.images import open_image

        original = Image.fromarray(open_image(self.picture))
        for path, image in zip(targets, self._drawn(original), strict=True):
            save_picture(image, path)

    def _drawn(self, original: "Image.Image") -> "list[Image.Image]":
        """The edited pictures."""
        import numpy as np
        from PIL import Image

        from varkit.data.images import open_image
        from varkit.devices import find_device
        from varkit.edit.inpaint import box_mask, inpaint, paste
        from varkit.edit.refine import refine, surrounded

        size, pipeline = parse_size(self.size), opened(self.model).to(find_device(self.device))
        prompt = self.caption if self.label is None else self.label
        pipeline = self.with_words(self.in_order(pipeline.sized(size)), device=self.device)
        if self.refine:
            return refine(pipeline, original, prompt, self.n, self.seed, **self.chosen())
        if size is not None:
            original, redraw = surrounded(original, size, self.place or (0.5, 0.5))
        elif self.mask is not None:
            redraw = np.asarray(Image.fromarray(open_image(self.mask)).convert("L")) > 127
        else:
            assert self.box is not None
            redraw = box_mask((original.height, original.width), self.box, inside=not self.outside)
        edited = inpaint(pipeline, original, redraw, prompt, self.n, self.seed, **self.chosen())
        return edited if self.raw else paste(edited, original, redraw)
