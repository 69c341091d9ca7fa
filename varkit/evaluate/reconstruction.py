"""What a tokenizer loses: PSNR, SSIM, its spectrum and the use of its codebook on pictures it was not trained on.

PSNR = 10 log10(2^2 / MSE) dB over pictures in [-1, 1], twice: of the mean squared error of all pictures, and the mean
of each picture's own, which is higher (Jensen) and which papers often report without saying so.
Legend: B batch, H W image.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varkit.data.base import Dataset
from varkit.devices import device_of, placed
from varkit.errors import UserError
from varkit.evaluate.spectrum import Spectra, Spectrum
from varkit.pictures import grid, to_pil, to_tensor
from varkit.tokenizers.base import Tokenizer
from varkit.tokenizers.codebook import CodebookStatistics

BATCH = 32
SHOWN = 8
SSIM_WINDOW = 7
"""Side of the windows that structural similarity compares; smaller pictures have none."""


@dataclass(frozen=True)
class Codebook:
    """Share of the codes chosen at least once, and the perplexity of the choice: V when all are equally frequent."""

    usage: float
    perplexity: float


@dataclass(frozen=True)
class Reconstruction:
    """Figures over all pictures; ssim is None without scikit-image, codebook None without discrete codes.

    `shown` and `worst` are pairs (2, 3, H, W) of original and reconstruction: the first pictures, and the worst first.
    """

    pictures: int
    psnr: float
    psnr_of_pictures: float
    ssim: float | None
    spectrum: Spectrum
    codebook: Codebook | None
    levels: tuple[Codebook, ...]
    shown: list[Tensor] = field(repr=False)
    worst: list[Tensor] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        figures = {name: getattr(self, name) for name in ("pictures", "psnr", "psnr_of_pictures", "ssim")}
        return figures | {
            "spectrum": self.spectrum.summary(),
            "codebook": None if self.codebook is None else asdict(self.codebook),
            "levels": [asdict(level) for level in self.levels],
        }

    def sheet(self) -> Image.Image:
        """Originals above their reconstructions: the first ones, then the worst ones."""
        rows = [torch.stack(pairs)[:, i] for pairs in (self.shown, self.worst) for i in (0, 1)]
        return grid([image for row in rows for image in to_pil(row)], columns=len(self.shown))


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer,
    images: Iterable[Tensor],
    watch: Callable[[Tensor, Tensor], None] = lambda batch, rebuilt: None,
) -> Reconstruction:
    """Encode and decode batches (B, 3, H, W) in [-1, 1], and compare; `watch` sees each and its reconstruction."""
    statistics: CodebookStatistics | None = None
    spectra = Spectra()
    errors: list[float] = []
    similarities: list[float] = []
    shown: list[Tensor] = []
    worst: list[tuple[float, Tensor]] = []
    for batch in images:
        latents = placed(tokenizer.encode(batch.to(device_of(tokenizer))), batch.device)
        rebuilt = tokenizer.decode(placed(latents, device_of(tokenizer))).to(batch.device)
        watch(batch, rebuilt)
        spectra.add(batch, rebuilt)
        if "ids" in latents:
            statistics = statistics or CodebookStatistics(_vocabulary(tokenizer), tokenizer.schedule)
            statistics.update(latents["ids"])
        own = (rebuilt - batch).square().mean(dim=(1, 2, 3)).tolist()
        pairs = list(torch.stack([batch, rebuilt], dim=1))
        errors += own
        similarities += _similarities(batch, rebuilt)
        shown += pairs[: SHOWN - len(shown)]
        worst = sorted([*worst, *zip(own, pairs, strict=True)], key=lambda pair: -pair[0])[:SHOWN]
    if not errors:
        raise UserError("there are no pictures to reconstruct; give --data with some, or a larger --n")
    figures = None if statistics is None else _codebooks(statistics)
    return Reconstruction(
        pictures=len(errors),
        psnr=psnr(float(np.mean(errors))),
        psnr_of_pictures=float(np.mean([psnr(error) for error in errors])),
        ssim=float(np.mean(similarities)) if similarities else None,
        spectrum=spectra.result(),
        codebook=figures[0] if figures else None,
        levels=figures[1:] if figures else (),
        shown=shown,
        worst=[pair for _, pair in worst],
    )


def pictures(dataset: Dataset, side: tuple[int, int], n: int) -> Iterator[Tensor]:
    """The first n items (all, if there are fewer) in batches (B, 3, H, W) in [-1, 1], cropped at the centre."""
    count = n if dataset.size is None else min(n, dataset.size)
    for start in range(0, count, BATCH):
        yield to_tensor(dataset.batch(range(start, min(count, start + BATCH)), side).images)


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error over [-1, 1]; at most 120, where rounding rules."""
    return float(10 * np.log10(4.0 / max(mse, 4e-12)))


def has_ssim() -> bool:
    """Whether scikit-image, which computes structural similarity, is installed."""
    return importlib.util.find_spec("skimage") is not None


def _vocabulary(tokenizer: Tokenizer) -> int:
    return len(tokenizer.quantizer.codebook)  # type: ignore[union-attr, arg-type]


def _codebooks(statistics: CodebookStatistics) -> tuple[Codebook, ...]:
    """Over all levels together, then of each."""
    levels = (None, *range(len(statistics.schedule)))
    return tuple(Codebook(statistics.usage(level), statistics.perplexity(level)) for level in levels)


def _similarities(images: Tensor, rebuilt: Tensor) -> list[float]:
    if not has_ssim() or min(images.shape[2:]) < SSIM_WINDOW:
        return []
    from skimage.metrics import structural_similarity

    pairs = zip(images.numpy(), rebuilt.numpy(), strict=True)
    return [
        float(structural_similarity(a, b, win_size=SSIM_WINDOW, channel_axis=0, data_range=2.0))
        for a, b in pairs
    ]
