"""A served workspace, in the process and on a real socket."""

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from qf.pipeline.config import ComputeOptions
from qf.pipeline.workspace import Workspace
from qf.retrieval.config import ServeOptions
from qf.retrieval.serve.app import make_app
from qf.retrieval.serve.collection import Collection
from qf.retrieval.serve.limits import Door, Limits
from qf.retrieval.serve.server import PatientProtocol, open_server
from starlette.testclient import TestClient

ON = ComputeOptions("cpu", "float32")
MAX_BYTES, MAX_PIXELS = 2**20, 1_000_000


@pytest.fixture(scope="session")
def collection(trained):
    return Collection(Workspace(trained), ON, MAX_PIXELS)


@pytest.fixture
def client(collection):
    with TestClient(make_app(collection, Door(), MAX_BYTES, 64)) as client:
        yield client


@contextlib.contextmanager
def running(workspace, **options):
    """`qf serve` on a free port, in a thread."""
    serving = open_server(Workspace(workspace), ServeOptions(port=0, **options), ON)
    limits = serving.app.app
    assert isinstance(limits, Limits)
    limits.body_seconds = 1.0
    patience, PatientProtocol.seconds = PatientProtocol.seconds, 1.0
    config = uvicorn.Config(
        serving.app, http=PatientProtocol, ws="none", log_config=None, access_log=False, limit_concurrency=900
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([serving.listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = serving.listener.getsockname()[1]
        yield SimpleNamespace(url=serving.url, port=port)
    finally:
        server.should_exit = True
        thread.join()
        PatientProtocol.seconds = patience
        serving.listener.close()


@pytest.fixture(scope="module")
def live(trained):
    with running(trained, max_upload=1.0, max_megapixels=1.0, queue=8) as server:
        yield server
