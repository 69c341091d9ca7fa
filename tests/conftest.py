"""Shared test settings: hypothesis is derandomised and has no deadline, torch uses two threads."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("varkit", derandomize=True, deadline=None, max_examples=40, print_blob=False)
settings.load_profile("varkit")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)
