"""Whether the parts that a folder names belong together: a generator, the tokenizer whose latents it follows, and the
order and heads beside it.

What `fitted` says of a generator is the measure, as far as sizes go. The rest is a choice: how far an order looks back,
in how many steps it refines, how a head is trained and samples.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from varkit.errors import UserError
from varkit.hub.registry import type_name
from varkit.plans.flexible import FlexibleScalesConfig
from varkit.plans.refined import RefinedConfig
from varkit.plans.schedule import Schedule

NEEDED = ("tokenizer", "plan", "generator", "head")
"""The parts without which nothing can be drawn."""

HEAD_SIZES = ("width", "vocab_size", "bits", "channels")
"""What a head takes and gives; which of them it has tells its kind."""

Difference = tuple[str, Any, Any]
"""What differs, and its value as it is and as it would have to be."""


def check_fit(configs: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` unless the generator's configuration is one that is fitted to the tokenizer's, and plan and
    heads are such as go with both.

    `configs` has the parts of `NEEDED` at least.
    """
    own = configs["generator"]
    try:
        fitted = own.fitted(configs["tokenizer"])
        for field in fields(own):
            for name, has, needs in _in_setting(field.name, own, fitted["generator"]):
                raise UserError(
                    f"{name} of the generator is {has} and would be {needs} for its tokenizer; take generator and "
                    "tokenizer from one model"
                )
        for part, config in fitted.items():
            if part not in configs:
                raise UserError(
                    f"the part {part} is missing, which the generator needs; it is not a whole model"
                )
            if part != "generator":
                _check_part(part, configs[part], config, own)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_part(part: str, own: Any, fitted: Any, generator: Any) -> None:
    differences = _in_plans(own, fitted, generator) if part == "plan" else _in_heads(own, fitted)
    for name, has, needs in differences:
        raise UserError(
            f"{name} of the {part} is {has} and would be {needs} for its generator and tokenizer; take tokenizer, "
            "generator, plan and heads from one model"
        )


def _in_plans(own: Any, fitted: Any, generator: Any) -> Iterator[Difference]:
    """Where an order differs from the fitted one in what it covers, or in what a generator reads off it."""
    layout = "schedule" if hasattr(fitted, "schedule") else "grid"
    special = (FlexibleScalesConfig, RefinedConfig)  # of other coordinates, and with a route of its own
    if not hasattr(own, layout) or any(isinstance(own, kind) != isinstance(fitted, kind) for kind in special):
        yield "kind", type_name(own), type_name(fitted)
    # A generator without a schedule of its own (FlexVAR, Infinity) draws in any, of as many scales as it knows.
    any_schedule = layout == "schedule" and not hasattr(generator, "schedule")
    for name in (*(() if any_schedule else (layout,)), "prefix"):
        if hasattr(own, name) and hasattr(fitted, name):
            yield from _in_setting(name, own, fitted)
    most = getattr(generator, "levels", None) if any_schedule else None
    if most is not None and len(own.schedule) > most:
        yield "number of scales", len(own.schedule), f"at most {most}"


def _in_heads(own: Any, fitted: Any) -> Iterator[Difference]:
    """Where a head differs from the fitted one in what it takes and gives."""
    sizes = [name for name in HEAD_SIZES if hasattr(fitted, name)]
    if sizes != [name for name in HEAD_SIZES if hasattr(own, name)]:
        yield "kind", type_name(own), type_name(fitted)
    for name in sizes:
        yield from _in_setting(name, own, fitted)


def _in_setting(name: str, own: Any, fitted: Any) -> Iterator[Difference]:
    has, needs = (_plain(name, getattr(config, name)) for config in (own, fitted))
    if has != needs:
        yield name, has, needs


def _plain(name: str, value: Any) -> Any:
    """A setting; the same for all that write the same sides."""
    if name == "grid":
        return Schedule.of(value).last
    return Schedule.parse(value).sides if name == "schedule" else value
