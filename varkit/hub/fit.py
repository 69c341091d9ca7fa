"""Whether the parts that a folder names belong together: a generator, and the tokenizer whose latents it follows."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from varkit.errors import UserError
from varkit.plans.schedule import Schedule


def check_fit(configs: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` unless the generator's configuration is one that is fitted to the tokenizer's."""
    own = configs["generator"]
    try:
        fitted = own.fitted(configs["tokenizer"])["generator"]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for field in fields(own):
        has, needs = (_plain(field.name, getattr(config, field.name)) for config in (own, fitted))
        if has != needs:
            raise UserError(
                f"{where}: {field.name} of the generator is {has} and would be {needs} for its tokenizer; take "
                "generator and tokenizer from one model"
            )


def _plain(name: str, value: Any) -> Any:
    """A setting; the same for all that write the same sides."""
    if name == "grid":
        return Schedule.of(value).last
    return Schedule.parse(value).sides if name == "schedule" else value
