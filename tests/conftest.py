"""Shared test settings: hypothesis is derandomised and has no deadline, torch uses two threads."""

import signal

import pytest
import torch
from hypothesis import settings

settings.register_profile("varkit", derandomize=True, deadline=None, max_examples=40, print_blob=False)
settings.load_profile("varkit")

# Child processes inherit an ignored SIGINT (a shell's background jobs have one), and could then not be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)
