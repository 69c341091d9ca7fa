"""`varkit generate --ray`: Ray Data draws a run's batches on many machines (extra `ray`); the pictures come back here.

Each worker opens the model as the command itself would, and draws whole batches, of the shape and with the threads that
one process would use; so on machines of one kind the pictures are the same, byte for byte. The command writes each
picture as it comes, so what an interrupted run has drawn stays, and `--resume` goes on from there.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varkit.cli.console import progress
from varkit.cli.generate import Drawn, Generate, Job, draw
from varkit.errors import UserError

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline


def draw_on_ray(pipeline: "Pipeline", jobs: Sequence[Job], options: Generate, alike: bool) -> Iterator[Drawn]:
    """What `draw` gives, in the order in which the workers finish."""
    import ray.data
    import torch
    from PIL import Image

    settings = pipeline.chosen(options.chosen())
    for _, prompt in jobs[:1]:  # a mistake in the settings shows here, not on a worker
        pipeline.start([prompt], options.seed, settings=settings, negative=options.negative)
    size = options.batch
    batches = [{"jobs": json.dumps(jobs[i : i + size])} for i in range(0, len(jobs), size)]
    if not batches:
        return
    threads = torch.get_num_threads()
    with cluster(options.ray or "local") as machines, progress("drawing", len(jobs)) as advance:
        cpus = min(threads, max(machines))
        workers = min(len(batches), sum(machine // cpus for machine in machines))
        drawn = ray.data.from_items(batches, override_num_blocks=len(batches)).flat_map(
            Worker,
            fn_constructor_args=(movable(options), pipeline.how.tokens, threads, alike),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
        )
        for row in drawn.iter_rows():
            advance()
            strip = Image.fromarray(row["strip"]) if "strip" in row else None
            yield row["number"], Image.fromarray(row["image"]), strip


class Worker:
    """The model on one machine: a batch of jobs to rows of number, image (H, W, 3) and, if wanted, strip."""

    def __init__(self, options: Generate, tokens: int | None, threads: int, alike: bool) -> None:
        import torch

        torch.set_num_threads(threads)
        self.options, self.alike = options, alike
        self.pipeline = options.opened().using(tokens=tokens)

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        import numpy as np

        jobs = [(number, prompt) for number, prompt in json.loads(row["jobs"])]
        drawn = draw(self.pipeline, jobs, self.options, self.alike)
        return [
            {"number": number, "image": np.asarray(image)} | ({"strip": np.asarray(strip)} if strip else {})
            for number, image, strip in drawn
        ]


def movable(options: Generate) -> Generate:
    """The options with paths that hold wherever a worker starts; a bundled model's name is none, whatever is here."""
    from varkit.hub.pipeline import bundled

    named = {name: getattr(options, name) for name in ("model", "text_encoder", "embeddings")}
    if options.model in bundled():
        del named["model"]
    here = {name: Path(place).resolve() for name, place in named.items() if place and Path(place).exists()}
    return replace(options, **{name: type(named[name])(place) for name, place in here.items()})


@contextmanager
def cluster(address: str) -> Iterator[list[int]]:
    """Ray, started here or joined; yields the CPUs of each machine. It reports nothing to anyone."""
    os.environ["RAY_usage_stats_enabled"] = "0"
    import ray
    import ray.data

    try:
        _check_reachable(address)
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster was found at {address!r} ({error}); start one (ray start --head), or give --ray local"
        ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]  # below the traceback of another process
        raise RuntimeError(f"a Ray worker failed: {reason}") from error
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise `OSError` at once where nobody listens at HOST:PORT; Ray itself goes on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), timeout=10).close()
