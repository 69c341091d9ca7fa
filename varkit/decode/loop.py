"""The one decoding loop: ask the plan for a step, feed the network, sample the head, let the canvas take it.

    for state in decode(model, state):
        show(state.canvas.preview())

`decode` is a generator, so progress bars, streaming previews, search, verification and early exit are its callers.
Legend: R condition branches, B samples, N = R x B, T targets, C width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varkit.canvases.base import gather_positions, steps_of
from varkit.decode.guidance import by_step
from varkit.decode.state import State
from varkit.generators.base import Generator, Prepared, branches_and_batch, rows
from varkit.heads.base import Ask, Head
from varkit.plans.base import CONFIDENCE, Plan
from varkit.plans.step import Step


@dataclass(frozen=True)
class Model:
    """What the loop needs: an order, a network, and a head for each route of the order."""

    plan: Plan
    generator: Generator
    heads: Mapping[str, Head]


def advance(model: Model, state: State) -> State:
    """Take one step with every sample that is not finished. The state is advanced in place and returned."""
    step = model.plan.next_step(state)
    if step is None:
        state.finished = torch.ones_like(state.finished)
        return state
    return take(model, state, step)


@torch.no_grad()
def take(model: Model, state: State, step: Step) -> State:
    """Take a given step: the plan's next, or several packed into one (a verification window, to be rolled back)."""
    _catch_up(model, state)
    prepared = state.prepared if step.guided else {k: v[:1] for k, v in state.prepared.items()}
    fed, h = _evaluate(model, state, step, prepared)
    if step.target.shape[-1]:
        values = model.heads[step.route].sample(_read(h, step, prepared), _ask(model, state, step, fed))
        if state.options.override is not None:
            values = state.options.override(step, values, state)
        step = model.plan.settle(step, values, state)
        values = {name: value for name, value in values.items() if name != CONFIDENCE}
        state.canvas.reveal(step, values, state.cursor)
    _count(state, step)
    state.finished = state.finished | model.plan.finished(state)
    return state


def decode(model: Model, state: State) -> Iterator[State]:
    """Advance until every sample is finished, yielding the state after each step."""
    while not bool(state.finished.all()):
        yield advance(model, state)


def run(model: Model, state: State) -> State:
    """`decode` to the end."""
    for _ in decode(model, state):
        pass
    return state  # `advance` works in place


def _evaluate(model: Model, state: State, step: Step, prepared: Prepared) -> tuple[dict[str, Tensor], Tensor]:
    """What the canvas feeds at a step, and the hidden states (N, L, C)."""
    fed = state.canvas.feed(step.feed)
    window = state.cache.open(step, state.cursor)
    h = model.generator(fed, step, prepared, window, state.options.ports)
    state.cache.close()
    return fed, h


def _catch_up(model: Model, state: State) -> None:
    """Feed again the steps that a rollback made the cache forget though the canvas still holds what they settled."""
    while (at := state.cache.behind(state.cursor)) is not None:
        past = replace(state, cursor=at, finished=at >= state.cursor)
        step = model.plan.next_step(past)
        assert step is not None, "the plan has no steps for what was rolled back"
        _evaluate(model, past, step, past.prepared)
        state.evaluations = state.evaluations + _moved(past, step)


def _read(h: Tensor, step: Step, prepared: Prepared) -> Tensor:
    """Hidden states (N, L, C) at the slots the step reads -> (R, B, T, C)."""
    branches, batch = branches_and_batch(prepared)
    if not step.reads_all:
        read = step.read if step.read.ndim == 1 else rows(step.read, branches)
        h = gather_positions(h, read)
    return h.unflatten(0, (branches, batch))


def _ask(model: Model, state: State, step: Step, fed: dict[str, Tensor]) -> Ask:
    at = steps_of(step, state.cursor)
    progress, temperature = model.plan.progress(at), state.options.temperature
    return Ask(
        step=step,
        draws=state.draws,
        at=at,
        progress=progress,
        combine=state.options.combine,
        pick=state.options.pick,
        fed=fed if step.reads_all else {k: gather_positions(v, step.read) for k, v in fed.items()},
        temperature=by_step(temperature, progress)[..., None]
        if isinstance(temperature, tuple)
        else temperature,
        confidence=model.plan.by_confidence(step),
    )


def _count(state: State, step: Step) -> None:
    moved = _moved(state, step)
    state.cursor = state.cursor + moved * step.turns
    state.evaluations = state.evaluations + moved
    committed = (step.reveal & (step.target >= 0)).expand(state.batch, -1).sum(dim=1)
    state.tokens = state.tokens + committed * moved


def _moved(state: State, step: Step) -> Tensor:
    """(B,) bool: samples that take the step."""
    if step.feed.ids.ndim == 1:
        return ~state.finished
    return ~state.finished & (step.feed.ids >= 0).any(dim=1)
