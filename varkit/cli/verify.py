"""`varkit verify`: run reference cases of published implementations and say whether ours agrees."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from varkit.cli.console import log, print_json, print_table

if TYPE_CHECKING:
    from varkit.hub.verify import Row


@dataclass(frozen=True)
class Verify:
    """Check this library against reference vectors of published code; the exit code is 1 if any falls short."""

    cases: Positional[tuple[Path, ...]]
    """The json files of the cases; the arrays lie beside them."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        from varkit.adapt.registry import REFERENCES
        from varkit.errors import UserError
        from varkit.hub.verify import FAMILIES, Case, verify_case

        if not self.cases:
            raise UserError("no case is given; write: varkit verify CASE.json ...")
        results, families = [], FAMILIES | REFERENCES
        # Mistakes in any show before work on the first.
        for case in [Case.open(path, families) for path in self.cases]:
            log(f"verifying {case.name}")
            started = time.perf_counter()
            rows = verify_case(case, families)
            results.append((case, rows, time.perf_counter() - started))
            if not self.json:
                _print_rows(case.name, rows)
        passed = all(row.passed for _, rows, _ in results for row in rows)
        if self.json:
            print_json({"passed": passed, "cases": [_summary(*result) for result in results]})
        return 0 if passed else 1


def _print_rows(name: str, rows: "list[Row]") -> None:
    columns = ("array", "role", "max error", "mismatches", "tolerance", "verdict")
    table = [
        (
            row.array,
            row.role,
            "" if row.error is None else f"{row.error:.1e}",
            "" if row.mismatches is None else f"{row.mismatches} of {row.count}",
            f"{row.tolerance:.0e}" if row.role == "compared" else "",
            "pass" if row.passed else "FAIL",
        )
        for row in rows
    ]
    print_table(columns, table, title=name)


def _finite(error: float | None) -> float | None:
    """JSON knows neither infinity nor NaN; the verdict beside it says that it failed."""
    return error if error is not None and math.isfinite(error) else None


def _summary(case: Any, rows: "list[Row]", seconds: float) -> dict[str, Any]:
    return {
        "case": case.name,
        "family": case.config["family"],
        "passed": all(row.passed for row in rows),
        "seconds": round(seconds, 2),
        "arrays": [asdict(row) | {"error": _finite(row.error)} for row in rows],
    }
