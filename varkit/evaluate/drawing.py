"""Pictures to judge: picture i depends on (model, settings, prompts, seed, i) alone, bit for bit on one machine.

The trick: batches have one fixed size and whole batches are drawn, since sums round differently at other batch shapes;
a suite makes its list of prompts longer than needed rather than the last batch shorter.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch

from varkit.decode.loop import run
from varkit.decode.state import State
from varkit.hub.pipeline import Pipeline, Prompt, Settings
from varkit.pictures import to_array
from varkit.ranks import current

BATCH = 16


def padded(n: int) -> int:
    """The smallest multiple of `BATCH` that is at least n."""
    return -(-n // BATCH) * BATCH


def draw(
    pipeline: Pipeline, prompts: Sequence[Prompt], seed: int = 0, settings: Settings | None = None
) -> Iterator[np.ndarray]:
    """One picture (H, W, 3) uint8 for each prompt, of which there must be a multiple of `BATCH`.

    Under `varkit.ranks.together` the processes share the batches, and every one gets all pictures.
    """
    assert len(prompts) % BATCH == 0, f"{len(prompts)} prompts do not fill batches of {BATCH}"
    ranks = current()
    numbers = np.arange(len(prompts)).reshape(-1, BATCH)
    own = numbers[ranks.rank :: ranks.world].flatten().tolist()
    states = pipeline.starts([prompts[i] for i in own], seed, BATCH, settings, own)
    for _ in range(0, len(numbers), ranks.world):
        made = [_shown(run(pipeline.model, state)) for state in islice(states, 1)]
        for images in ranks.gathered(made):
            yield from (image for batch in images for image in batch)


@torch.no_grad()
def _shown(state: State) -> np.ndarray:
    return to_array(state.canvas.preview())
