"""Train a tiny model for ten steps, alone or under torchrun: FOLDER [STOP], where STOP ends the process that early."""

import sys
from contextlib import suppress
from pathlib import Path

import torch

from tests.contracts import CASES
from tests.test_objective import constant_tokens
from varkit.ranks import together
from varkit.train.generator_task import Forced, NextStepTask
from varkit.train.loop import train
from varkit.train.task import TrainConfig
from varkit.train.trainer import Trainer

STEPS = 10


class Stop(Exception):
    """The process is to end here."""


def main(folder: Path, stop: int = STEPS) -> None:
    """Go on with the run in `folder`, if there is one."""
    tokenizer, model = CASES["var-class"].build()
    tokens = constant_tokens(tokenizer.canvas(1).revealed_at.shape[1])
    parts = Forced(tokenizer, model.generator, model.heads["main"], model.plan)
    task = NextStepTask(parts, tokens, tokens, 4, {}, condition_drop=0.3)
    config = TrainConfig(
        steps=STEPS, lr=3e-3, accumulation=2, log_every=1, checkpoint_every=1, validate_every=5
    )
    step = Trainer.step

    def stopping(self: Trainer, steps: int):
        if self.at.step == stop:
            raise Stop
        return step(self, steps)

    Trainer.step = stopping  # type: ignore[method-assign]
    with together(), suppress(Stop):  # every rank stops at the same step, and they part in order
        train(task, config, folder, resume=(folder / "config.json").exists(), quiet=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
