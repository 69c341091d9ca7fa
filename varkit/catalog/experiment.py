"""What an experiment says: the paper's claim, what is compared, what is measured, and when the claim holds.

An experiment is one file in `experiments/`, named after its system, that defines `EXPERIMENT`. A part of it compares
arms: models that are trained alike and differ in one idea. The rule that decides is written down with the rest, before
anything is measured; `varkit/catalog/harness.py` does the measuring.
Legend: S seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from statistics import correlation, fmean, linear_regression, stdev
from typing import TYPE_CHECKING, Any, Protocol

from varkit.catalog.models import Trained

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline

Values = Mapping[str, Mapping[str, Sequence[float]]]
"""arm -> metric -> one value a seed, seeds in the same order everywhere."""


@dataclass
class Subject:
    """What a metric measures: an arm's model at a seed, and the arm's options for metrics.

    `kept` holds what metrics of one subject share, such as pictures.
    """

    pipeline: "Pipeline"
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A figure of a model. key: what it depends on beside its name, such as how many pictures it takes."""

    name: str
    measure: Callable[[Subject], float]
    unit: str = ""
    key: str = ""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a model for each training seed, how the method is applied, options for metrics."""

    name: str
    model: Callable[[int], Trained]
    apply: Callable[["Pipeline"], "Pipeline"] = lambda pipeline: pipeline
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a rule finds: one line, and whether the claim holds. details: figures of its own."""

    measured: str
    holds: bool
    details: dict[str, Any] = field(default_factory=dict)


class Rule(Protocol):
    """Decides from the values alone."""

    def __call__(self, values: Values) -> Verdict: ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class AtMost:
    """Holds when `variant` over `base` is at most `limit`, as the mean over seeds; with `difference`, minus it."""

    metric: str
    variant: str
    base: str
    limit: float
    difference: bool = False

    def __call__(self, values: Values) -> Verdict:
        pairs = zip(values[self.variant][self.metric], values[self.base][self.metric], strict=True)
        compared = [v - b if self.difference else v / b for v, b in pairs]
        variant, base = (self._shown(values, arm) for arm in (self.variant, self.base))
        text = f"{self.metric} {variant} against {base} of {self.base}"
        return Verdict(text, self._holds(fmean(compared)), {"compared": compared})

    def __str__(self) -> str:
        return f"{self.metric} of {self.variant} {self._relation} {self.limit:g} {self._against}"

    _relation = "at most"

    @property
    def _against(self) -> str:
        return f"more than {self.base}'s" if self.difference else f"times {self.base}'s"

    def _holds(self, mean: float) -> bool:
        return mean <= self.limit

    def _shown(self, values: Values, arm: str) -> str:
        found = values[arm][self.metric]
        return f"{fmean(found):.4g}{spread(found)}"


class AtLeast(AtMost):
    """Holds when the same comparison is at least `limit`."""

    _relation = "at least"

    def _holds(self, mean: float) -> bool:
        return mean >= self.limit


@dataclass(frozen=True)
class PowerLaw:
    """Holds when log `metric` against log `size`, over all arms, correlates at `correlation` (below 0) or stronger."""

    metric: str
    size: str
    correlation: float

    def __call__(self, values: Values) -> Verdict:
        sizes = [fmean(by_metric[self.size]) for by_metric in values.values()]
        found = [fmean(by_metric[self.metric]) for by_metric in values.values()]
        x, y = [log(size) for size in sizes], [log(value) for value in found]
        r = correlation(x, y)
        slope, _ = linear_regression(x, y)
        text = (
            f"{self.metric} falls as {self.size} to the {slope:.3f}, correlation {r:.4f} over {len(x)} sizes"
        )
        return Verdict(text, r <= self.correlation, {"exponent": slope, "correlation": r})

    def __str__(self) -> str:
        return f"log {self.metric} correlates with log {self.size} at {self.correlation:g} or stronger"


@dataclass(frozen=True)
class All:
    """Holds when all of its rules do."""

    rules: tuple[Rule, ...]

    def __call__(self, values: Values) -> Verdict:
        verdicts = [rule(values) for rule in self.rules]
        details = {str(rule): verdict.holds for rule, verdict in zip(self.rules, verdicts, strict=True)}
        return Verdict("; ".join(v.measured for v in verdicts), all(v.holds for v in verdicts), details)

    def __str__(self) -> str:
        return " and ".join(map(str, self.rules))


@dataclass(frozen=True)
class Part:
    """One claim. paper: its figure in the paper. seeds: training seeds, or sampling seeds of one model (`sampling`)."""

    name: str
    paper: str
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    rule: Rule
    seeds: tuple[int, ...] = (0, 1, 2)
    sampling: bool = False

    def model(self, arm: Arm, seed: int) -> Trained:
        """The model of an arm at a seed."""
        return arm.model(0 if self.sampling else seed)


@dataclass(frozen=True)
class Experiment:
    """The parts, the headline first; `measures` is one sentence on what is done and how it differs from the paper."""

    name: str
    measures: str
    parts: tuple[Part, ...]

    def models(self, seeds: int | None = None) -> list[Trained]:
        """Every model it needs, each once."""
        found = {
            model.address: model
            for part in self.parts
            for arm in part.arms
            for seed in part.seeds[:seeds]
            for model in [part.model(arm, seed)]
        }
        return list(found.values())


def spread(values: Sequence[float]) -> str:
    """The standard deviation over seeds, as text; nothing for one seed."""
    return f" ± {stdev(values):.2g}" if len(values) > 1 else ""
