"""A record of the catalogue: what a paper proposes, in the vocabulary of `varkit/catalog/vocabulary.py`, and claims.

What can be derived is a property, never typed in: the year comes from the arXiv number, the family from the unit.
"""

import re
from dataclasses import dataclass

from varkit.catalog.vocabulary import FAMILY_OF_UNIT, VOCABULARY
from varkit.errors import UserError, unknown_name

MOST_CLAIMS = 3
_ARXIV = re.compile(r"\d{4}\.\d{5}")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_LINE = re.compile(r"\S.*")
_CODE = re.compile(r"varkit(\.\w+)+:\w+")


@dataclass(frozen=True)
class Claim:
    """A figure that a paper reports, never without what was measured and how."""

    metric: str
    value: str
    """As printed, with its unit; a word such as "better" where the number could not be read."""
    setting: str
    """Data, resolution, model size, guidance: whatever the figure depends on."""
    source: str
    baseline: str = ""
    """What it is compared with."""
    baseline_value: str = ""

    def __str__(self) -> str:
        """One line, such as "FID: 3.05 against 3.55 of VAR-d16 (ImageNet 256)"."""
        against = " of ".join(filter(None, (self.baseline_value, self.baseline)))
        return f"{self.metric}: {self.value}{against and f' against {against}'} ({self.setting})"


@dataclass(frozen=True)
class System:
    """One system: a paper, what it builds on, and the code in varkit that implements it."""

    name: str
    """Its id, and the name of its file."""
    title: str
    """The method's name and the paper's title."""
    arxiv: str
    """Number on arXiv, such as "2404.02905"."""
    licence: str
    """Of the published code: "none" where there is no licence or no code, "unknown" where it was not seen."""
    summary: str
    """One sentence: the idea."""
    stage: tuple[str, ...]
    unit: str
    representation: str
    order: str
    head: str
    tasks: tuple[str, ...]
    techniques: tuple[str, ...]
    conditioning: tuple[str, ...]
    room: str
    """The folder of varkit where its code belongs."""
    claims: tuple[Claim, ...]
    """What the paper reports; the first is the headline."""
    repository: str = ""
    """The published code, "owner/name" on GitHub; empty where there is none."""
    base: tuple[str, ...] = ()
    """Names of the systems it builds on."""
    code: tuple[str, ...] = ()
    """What implements it here, as "varkit.module:object"."""
    substrate: bool = False
    """Whether it is here because others build on it, and not one of the listed systems itself."""

    def __post_init__(self) -> None:
        for field in ("title", "licence", "summary"):
            self._check(field, getattr(self, field), _LINE, "one line of text")
        self._check("arxiv", self.arxiv, _ARXIV, 'a number such as "2404.02905"')
        if self.repository:
            self._check("repository", self.repository, _REPOSITORY, '"owner/name"')
        for path in self.code:
            self._check("code", path, _CODE, '"varkit.module:object"')
        for field in VOCABULARY:
            if field != "source":
                self._check_words(field, getattr(self, field))
        if not 1 <= len(self.claims) <= MOST_CLAIMS:
            raise UserError(f"{self.name}.toml has {len(self.claims)} claims; give 1 to {MOST_CLAIMS}")
        for claim in self.claims:
            self._check_words("source", claim.source)
            for field in ("metric", "value", "setting"):
                self._check(f"claims.{field}", getattr(claim, field), _LINE, "one line of text")

    @property
    def year(self) -> int:
        """When it first appeared."""
        return 2000 + int(self.arxiv[:2])

    @property
    def family(self) -> str:
        """pixel, token, scale or other, by the unit that is predicted."""
        return FAMILY_OF_UNIT.get(self.unit, "other")

    def _check(self, field: str, value: str, form: re.Pattern[str], wanted: str) -> None:
        if not form.fullmatch(value):
            raise UserError(f"{self.name}.toml: {field} is {value!r}; it must be {wanted}")

    def _check_words(self, field: str, value: str | tuple[str, ...]) -> None:
        words = (value,) if isinstance(value, str) else value
        if not words:
            raise UserError(f"{self.name}.toml: {field} is empty; name at least one of its words")
        for word in words:
            if word not in VOCABULARY[field]:
                raise unknown_name(field, word, VOCABULARY[field], hint=f"(in {self.name}.toml)")
