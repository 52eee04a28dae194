"""Servers over the tiny checkpoint."""

import contextlib

import pytest
from running_server import RunningServer


@pytest.fixture(scope="session")
def server(folder):
    one = RunningServer(folder)
    yield one
    one.close()


@pytest.fixture
def start(folder):
    """Starts further servers, with options."""
    with contextlib.ExitStack() as stack:

        def start_one(**options):
            one = RunningServer(folder, **options)
            stack.callback(one.close)
            return one

        yield start_one


@pytest.fixture
def client(server):
    with server.client() as one:
        yield one


@pytest.fixture
def held(server):
    """The server, whose answers wait until `engine.resumed` is set."""
    server.engine.resumed.clear()
    yield server
    server.engine.resumed.set()
