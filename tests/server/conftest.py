"""The server of tests/served.py, made once for all tests that do not need one of their own."""

import functools
import time

import pytest

import served


@pytest.fixture(scope="session")
def model():
    return served.tiny_model()


@pytest.fixture(scope="session")
def session(model):
    return served.tiny_session(model)


@pytest.fixture(scope="session")
def adapter_folders(model, tmp_path_factory):
    return served.save_adapters(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def run_server(model, session, adapter_folders):
    """Start a server of one's own: `with run_server(keys=..., limits=...) as running`."""
    return functools.partial(served.started, model, session, adapter_folders)


@pytest.fixture(scope="session")
def server(run_server):
    """A server that most tests share."""
    with run_server() as running:
        yield running


@pytest.fixture
def wait_until():
    """Wait for something that another thread brings about."""

    def wait(is_so, seconds=served.SECONDS):
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.01)

    return wait
