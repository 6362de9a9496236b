"""One model and one server for all tests that leave them as they are."""

import pytest
from serving import Running

import paligemma
from paligemma.allocator import give_back_freed_memory
from paligemma.serve.server import FREED_AT_ONCE
from paligemma.serve.settings import Settings


@pytest.fixture(scope="session", autouse=True)
def as_the_command_does():
    give_back_freed_memory(FREED_AT_ONCE)


@pytest.fixture(scope="session")
def pg():
    """The embedded model in float32, in which an answer does not depend on what runs beside it."""
    return paligemma.load("tiny", dtype="float32")


@pytest.fixture(scope="session")
def server(pg):
    running = Running(lambda: pg, Settings(max_new_tokens=512))
    yield running
    running.stop()


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
