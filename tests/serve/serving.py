"""A server in this process, asked as over a network."""

from contextlib import contextmanager

from starlette.testclient import TestClient


@contextmanager
def serving(model, **settings):
    """A client of a server of the model; the server ends with the block."""
    from armo.serve.server import create_app
    from armo.serve.service import ServerSettings

    app = create_app(model, name="tiny", settings=ServerSettings(**settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
