"""The server under load: pictures a second and a client's wait, for several batches and numbers of clients.

    python benchmarks/serve.py [--model NAME_OR_DIR] [--batches 1 4 8] [--clients 1 8 32] [--pictures N] [--rounds N]

`--batch 1` draws one by one, which is what the others are compared with. One server for each batch, all started
before; they are asked in turn, so that all meet the same machine. Each client asks for one picture after the other. The
clients' process shares the machine with the servers, as does encoding. Medians over rounds; the last line is JSON.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import torch

from varkit.cli.console import print_table
from varkit.hardware import hardware

Load = tuple[int, int]
"""Rows of a batch, and clients."""


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    options = _options()
    loads = [(batch, clients) for clients in options.clients for batch in options.batches]
    with ExitStack() as stack:
        servers = {b: stack.enter_context(served(options.model, b)) for b in options.batches}
        prompt = prompt_for(servers[options.batches[0]])
        rates: dict[Load, list[float]] = {load: [] for load in loads}
        waits: dict[Load, list[float]] = {load: [] for load in loads}
        for turn in range(options.rounds + 1):
            for load in loads:
                rate, wait = asyncio.run(ask(servers[load[0]], prompt, load[1], options.pictures))
                if turn:  # the first warms up
                    rates[load].append(rate)
                    waits[load].append(wait)
    rows = [row(load, rates, waits, options.batches[0]) for load in loads]
    print_table(list(rows[0]), [[_shown(value) for value in each.values()] for each in rows])
    facts = {
        "model": options.model,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "rounds": options.rounds,
    }
    print(json.dumps({"what": "serve", "loads": rows} | facts))


def row(
    load: Load, rates: dict[Load, list[float]], waits: dict[Load, list[float]], base: int
) -> dict[str, Any]:
    """One line of the table; the ratio is to the first batch at the same number of clients."""
    batch, clients = load
    rate = statistics.median(rates[load])
    return {
        "clients": clients,
        "batch": batch,
        "pictures_per_second": rate,
        f"times_batch_{base}": rate / statistics.median(rates[base, clients]),
        "median_wait": statistics.median(waits[load]),
    }


async def ask(address: str, prompt: str, clients: int, pictures: int) -> tuple[float, float]:
    """Pictures a second and the median wait, while `clients` take `pictures` each, after another."""
    waits: list[float] = []

    async def one(client: httpx.AsyncClient, number: int) -> None:
        for i in range(pictures):
            start = time.perf_counter()
            body = {"prompt": prompt, "seed": number * pictures + i}
            (await client.post(f"{address}/images/generations", json=body)).raise_for_status()
            waits.append(time.perf_counter() - start)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one(client, number) for number in range(clients)))
        return clients * pictures / (time.perf_counter() - start), statistics.median(waits)


@contextmanager
def served(model: str, batch: int) -> Iterator[str]:
    """A server's address."""
    words = [sys.executable, "-m", "varkit", "serve", "--port", "0", "--model", model, "--batch", str(batch)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+/v1", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line!r}")
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def prompt_for(address: str) -> str:
    """Something that the server's model can draw."""
    kind = httpx.get(f"{address}/models").json()["data"][0]["prompts"]
    return "0" if kind == "classes" else "a red circle"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="scenes", help="a bundled model, or a folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pictures", type=int, default=4, help="for each client, in a round")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
