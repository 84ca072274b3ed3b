"""Servers of a model in this process."""

import signal
import threading
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
    """A server of the model and its port; it ends with the block."""
    from armo.serve.server import Server, create_app, listen
    from armo.serve.service import ServerSettings

    made = ServerSettings(port=0, **settings)
    with listen(made) as listener:
        server = Server(create_app(model, name="tiny", settings=made), made)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield server, listener.getsockname()[1]
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join()


@contextmanager
def held(engine):
    """Let passes wait until the block ends; an event says that one has begun."""
    started, go, embed = threading.Event(), threading.Event(), engine._embed

    def slow(rows):
        started.set()
        assert go.wait(30)
        return embed(rows)

    engine._embed = slow
    try:
        yield started
    finally:
        go.set()
