"""The example service on real sockets, for tests of it: run in a thread, asked over HTTP."""

from __future__ import annotations

import http.client
import importlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from factories import randomise, tiny_teacher

import pyard
from pyard.models.student import Student
from pyard.runtime import OnnxPipeline, OnnxStudent

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the extra 'serve' is not installed: pip install '.[serve]'")
import uvicorn  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "serve.py"
if str(EXAMPLE.parent) not in sys.path:
    sys.path.append(str(EXAMPLE.parent))  # where the script finds them
app: Any = importlib.import_module("service.app")
connections: Any = importlib.import_module("service.connections")


def grey_student() -> Student:
    teacher = tiny_teacher(in_channels=1)
    student = Student.from_teacher(teacher, pyard.TimeGrid.build(teacher.schedule, 2), history_layers=1)
    randomise(student, 1)
    return student.eval()


@contextmanager
def running(student: OnnxStudent | OnnxPipeline, **limits: Any) -> Iterator[int]:
    """The service on a port of the loopback."""
    application = app.make_app(student, app.Limits(**limits))
    config = uvicorn.Config(application, port=0, log_level="warning", http=connections.ImpatientProtocol)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def get(port: int, path: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def answers(port: int) -> bool:
    try:
        return get(port, "/healthz")[0] == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
