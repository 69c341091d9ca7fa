"""schemathesis asks the real server whatever its own description allows, and does not; every answer is as described."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serving import Server, server

KEY = "a-key-of-many-letters"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with server("--model", "digits", "--port", "0", "--batch", "1", keys=KEY) as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_as_described(running: Server, mode: GenerationMode):
    address = running.address.removesuffix("/v1")
    described = schemathesis.openapi.from_url(f"{address}/openapi.json", headers=HEADERS)
    asked = set()
    for found in described.get_all_operations():
        operation = found.ok()
        asked.add(operation.path)

        @settings(max_examples=40, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            # Which prompts and sizes there are depends on the model: what fits the description may still be refused.
            answer = case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance])
            assert "Traceback" not in answer.text and "site-packages" not in answer.text

        try:
            check()
        except Unsatisfiable:  # of an address that takes nothing, nothing can be wrong
            assert mode is GenerationMode.NEGATIVE and operation.method == "get"
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/models/{name}"} < asked
