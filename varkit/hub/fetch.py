"""Files from the Hugging Face hub, by way of its cache."""

from collections.abc import Sequence
from textwrap import shorten

REASON = 160
"""Characters of a library's words that a line of ours repeats."""


class NotFetched(Exception):
    """Why the hub gave no files."""


def fetched(name: str, revision: str | None, patterns: Sequence[str]) -> str:
    """The folder in the hub's cache that holds a repository's files, after fetching those not yet there.

    Raises `NotFetched`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, allow_patterns=list(patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise NotFetched(first_words(error)) from error


def first_words(error: Exception) -> str:
    """What a library says in its first line, cut between words where it is long; its kind where it says nothing."""
    said = str(error).strip() or type(error).__name__
    return shorten(said.splitlines()[0], REASON, placeholder=" (...)")
