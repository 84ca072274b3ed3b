"""Servers in processes of their own, on ports that are free."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager


@contextmanager
def armo_serve(folder, *settings):
    """The address of a server of the model in a folder."""
    command = [sys.executable, "-m", "armo.cli", "serve", f"model={folder}", "device=cpu"]
    with serving([*command, *settings], port="port={}", cwd=folder) as url:
        yield url


@contextmanager
def serving(command, *, port, **how):
    """The address of what a command starts; it is told to stop with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    url = f"http://127.0.0.1:{number}"
    with subprocess.Popen([*command, port.format(number)], **how) as process:
        try:
            deadline = time.monotonic() + 180
            while not _answers(f"{url}/health"):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def _answers(url):
    try:
        with urllib.request.urlopen(url) as reply:
            return reply.status == 200
    except urllib.error.URLError:
        return False
