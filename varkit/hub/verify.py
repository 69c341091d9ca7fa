"""Reference cases: inputs and outputs of a published implementation, which ours has to reproduce.

A case is NAME.json (configuration, the published state dicts' names and shapes) and NAME.npz (arrays); the weights are
regenerated from their names. Every array is an input or is compared: one that is neither counts as a failure.
"""

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varkit.errors import UserError, unknown_name
from varkit.files import StrPath
from varkit.hub.fill import filled_state
from varkit.hub.states import State

FAMILIES: dict[str, str] = {
    "flexvar": "varkit.hub.verify_flexvar:verify",
    "hmar": "varkit.hub.verify_hmar:verify",
    "infinity": "varkit.hub.verify_infinity:verify",
    "llamagen": "varkit.hub.verify_llamagen:verify",
    "m_var": "varkit.hub.verify_m_var:verify",
    "mar": "varkit.hub.verify_mar:verify",
    "var": "varkit.hub.verify_var:verify",
}
"""Family of a case -> the function that runs it. Rooms that build on this one have families of their own, which a
caller adds (`varkit.adapt.registry.REFERENCES`)."""

TOLERANCE = 1e-3
MAX_TIES = 0.005
"""The share of discrete tokens that may differ, and then only by a tie within `TOLERANCE`."""


@dataclass(frozen=True)
class Row:
    """What became of one array. role: "input", "compared" or "unused".

    error: the largest difference; for tokens, between the scores of their choice and the best. mismatches: tokens that
    differ, of `count` values.
    """

    array: str
    role: str
    count: int
    error: float | None
    mismatches: int | None
    tolerance: float
    passed: bool


@dataclass
class Case:
    """One case while it is run: `input`, `compare` and `compare_tokens` consume arrays and note the outcome."""

    name: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, path: StrPath, families: Mapping[str, str] = FAMILIES) -> "Case":
        """Read a case. Raises `UserError` when a file is missing or unreadable, or the family unknown."""
        file = Path(path)
        config = _read_json(file)
        if not isinstance(config, dict) or not isinstance(config.get("family"), str):
            raise UserError(
                f"{str(file)!r} names no family, so it is not a reference case; give a case's json file"
            )
        if config["family"] not in families:
            raise unknown_name("family", config["family"], families, f"(in {str(file)!r})")
        return cls(file.stem, config, _read_arrays(file.with_suffix(".npz")))

    def entry(self, *keys: str) -> Any:
        """A value of the case's json, by its nested keys."""
        value: Any = self.config
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                raise UserError(
                    f"case {self.name!r} lacks {'.'.join(keys)} in its json; fetch the case again"
                )
            value = value[key]
        return value

    def state(self, key: str, after: int = 0) -> State:
        """The published state dict listed under `key`, regenerated; without what its constructor makes.

        after: added to the case's seed, where states of the same names are to differ."""
        return filled_state(self.entry(key), self.entry("seed") + after, self.entry("not_filled"))

    def input(self, name: str) -> Tensor:
        """An array given to the model."""
        array = self.reference(name)
        self._note(Row(name, "input", array.numel(), None, None, 0.0, True))
        return array

    def reference(self, name: str) -> Tensor:
        """An array's values, not consuming it. Integers come back as int64."""
        if name not in self.arrays:
            raise UserError(f"case {self.name!r} lacks the array {name!r} in its npz; fetch the case again")
        array = torch.from_numpy(self.arrays[name])
        return array if array.is_floating_point() else array.long()

    def compare(self, name: str, ours: Tensor, relative: bool = False) -> None:
        """Compare real values: within `TOLERANCE` everywhere, or within as much of their deviation."""
        theirs = self.reference(name)
        same = theirs.shape == ours.shape
        error = (ours - theirs).abs().max().item() if same else math.inf
        error = error / theirs.std().item() if relative else error
        self._note(Row(name, "compared", ours.numel(), error, None, TOLERANCE, error <= TOLERANCE))

    def compare_tokens(self, name: str, ours: Tensor, gap: Tensor) -> None:
        """Compare discrete choices made on the reference's own past: all but a few ties are equal.

        gap: how much worse the reference's choice scores than the best, everywhere, of the shape of `ours`.
        """
        theirs = self.reference(name)
        assert theirs.shape == ours.shape == gap.shape, (theirs.shape, ours.shape, gap.shape)
        mismatches = int((theirs != ours).sum())
        error = gap.max().item()
        passed = error <= TOLERANCE and mismatches <= MAX_TIES * ours.numel()
        self._note(Row(name, "compared", ours.numel(), error, mismatches, TOLERANCE, passed))

    def close(self) -> list[Row]:
        """The rows of all arrays; those that nothing consumed have failed."""
        seen = {row.array for row in self.rows}
        for name in self.arrays:
            if name not in seen:
                self._note(Row(name, "unused", self.arrays[name].size, None, None, 0.0, False))
        return self.rows

    def _note(self, row: Row) -> None:
        assert row.array not in {r.array for r in self.rows}, f"{row.array} is consumed twice"
        self.rows.append(row)


def verify_case(case: Case, families: Mapping[str, str] = FAMILIES) -> list[Row]:
    """Run one case through the library and return what became of each array."""
    module, _, attribute = families[case.config["family"]].partition(":")
    run: Callable[[Case], None] = getattr(importlib.import_module(module), attribute)
    with torch.no_grad():
        run(case)
    return case.close()


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no case {str(file)!r}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is not JSON ({error}); give a case's json file") from error


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"the case's arrays {str(file)!r} are missing; they belong beside the json file")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # zip, zlib and npy reading each raise their own kinds
        raise UserError(
            f"{str(file)!r} is not a readable npz of plain arrays ({error}); fetch it again"
        ) from error
