"""schemathesis asks the real server whatever its own description allows, and does not; every answer is as described."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serving import Server, server

KEY = "a-key-of-many-letters"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with server("--model", "digits", "--port", "0", "--batch", "1", keys=KEY) as started:
        yield started


@pytest.fixture(scope="module")
def described(running: Server) -> schemathesis.BaseSchema:
    address = running.address.removesuffix("/v1") + "/openapi.json"
    return schemathesis.openapi.from_url(address, headers=HEADERS)


schema = schemathesis.pytest.from_fixture("described")


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case: schemathesis.Case):
    # Which prompts and sizes there are depends on the model, so what fits the description may still be refused.
    answer = case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance])
    assert "Traceback" not in answer.text and "site-packages" not in answer.text
