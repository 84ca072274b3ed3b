"""Servers of a model in this process."""

import threading
import time
from contextlib import contextmanager

from starlette.testclient import TestClient


@contextmanager
def serving(model, **settings):
    """A client of a server of the model, asked without a network; it ends with the block."""
    from armo.serve.server import create_app
    from armo.serve.service import ServerSettings

    app = create_app(model, name="tiny", settings=ServerSettings(**settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@contextmanager
def listening(model, **settings):
    """The port of a server of the model; it ends with the block."""
    import uvicorn

    from armo.serve.server import create_app, uvicorn_options
    from armo.serve.service import ServerSettings

    made = ServerSettings(port=0, **settings)
    app = create_app(model, name="tiny", settings=made)
    server = uvicorn.Server(uvicorn.Config(app, **uvicorn_options(made)))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
