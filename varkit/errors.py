"""Errors that a person reads: one line that says what, the value, what is allowed, and what to try."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The input was wrong. Commands print the message on one line and exit with status 2."""


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """Return a `UserError` for an unknown `name`, listing the nearest known ones (or all, when few)."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        options = "did you mean " + " or ".join(repr(n) for n in near) + "?"
    elif not names:
        options = "none is known"
    elif len(names) <= 12:
        options = "known: " + ", ".join(names)
    else:
        options = f"known: {', '.join(names[:8])}, ... ({len(names)} in all)"
    aside = hint.startswith("(") or options.endswith("?")
    return UserError(
        f"unknown {kind} {name!r}; {options}" + (f"{'' if aside else '.'} {hint}" if hint else "")
    )


def no_numbers(what: str) -> UserError:
    """Return a `UserError` for NaN in `what` a model gives."""
    return UserError(
        f"{what} has NaN: a number overflowed or a weight is damaged; try float32, or fetch the model again"
    )
