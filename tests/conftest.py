"""What every test may use: one thread of BLAS, and small files to work on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.files import llama_config, llama_tensors, write_checkpoint
from tests.hub.client import Client
from tests.hub.repositories import User
from tests.hub.server import Hub, running

# the same cases on every run, and no deadline: the first example of a test pays for its imports
settings.register_profile("loratools", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loratools")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tests run beside each other (pytest-xdist), and tiny products only lose by being shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama-shaped checkpoint in one file: two layers, untied, float32."""
    return write_checkpoint(tmp_path / "base", llama_tensors(), llama_config())


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub on loopback, empty: one user, ada, whose token hf_ada may write."""
    with running() as made:
        made.users["hf_ada"] = User("ada")
        yield made


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    """A machine that knows this Hub, without a token and with an empty cache."""
    (tmp_path / "home").mkdir()
    return Client(hub, tmp_path / "home")
