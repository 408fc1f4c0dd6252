"""The example service: concurrent requests are drawn together, and whoever waits is told what becomes of it."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import tiny_student
from PIL import Image
from services import EXAMPLE, answers, app, connections, free_port, get, grey_student, running, wait_until

from pyard.errors import InputError
from pyard.export import export_onnx
from pyard.runtime import OnnxStudent


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("serve") / "student.onnx"
    export_onnx(grey_student(), file)
    return file


def test_concurrent_requests_are_drawn_together_and_each_gets_its_own(path: Path) -> None:
    student = OnnxStudent(path, threads=1)
    wanted = [(i % 5, 100 + i) for i in range(24)]
    with running(student, max_batch=6, max_wait=0.2) as port, ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda one: get(port, f"/image?label={one[0]}&seed={one[1]}"), wanted))
    assert {status for status, _, _ in answers} == {200}
    sizes = [int(headers["x-batch-size"]) for _, headers, _ in answers]
    assert 1 < max(sizes) <= 6
    pictures = [np.asarray(Image.open(io.BytesIO(body))).astype(int) for _, _, body in answers]
    for (label, seed), picture in zip(wanted, pictures, strict=True):
        sample = student.sample([label], seed=seed)[0, 0].clip(-1, 1)
        assert np.abs(picture - (sample + 1) * 127.5).max() <= 1
    assert np.abs(pictures[0] - pictures[5]).max() > 5, "the same label with another seed"


def test_health_and_info(path: Path) -> None:
    with running(OnnxStudent(path)) as port:
        status, _, body = get(port, "/healthz")
        assert (status, json.loads(body)) == (200, {"status": "ok", "waiting": 0})
        info = json.loads(get(port, "/info")[2])
    assert (info["num_classes"], info["num_steps"], info["sample_shape"]) == (5, 2, [1, 8, 8])


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("label=5", 400, "label 5: expected 0 to 4"),
        ("label=-1", 400, "label -1: expected 0 to 4"),
        ("label=1&seed=-3", 400, "seed is -3"),
        ("label=cat", 422, "valid integer"),
        ("", 422, "label"),
    ],
)
def test_wrong_requests(path: Path, query: str, status: int, message: str) -> None:
    with running(OnnxStudent(path)) as port:
        found, _, body = get(port, f"/image?{query}")
    assert found == status
    assert message in body.decode()


class Held(OnnxStudent):
    """A student that draws when it is allowed to."""

    allowed = threading.Event()
    started = threading.Event()

    def sample(self, *args: Any, **settings: Any) -> Any:
        self.started.set()
        assert self.allowed.wait(60)
        return super().sample(*args, **settings)


def test_a_full_queue_is_said_at_once(path: Path) -> None:
    with running(Held(path), max_batch=1, max_queue=2, max_count=1) as port, ThreadPoolExecutor(3) as pool:
        first = pool.submit(get, port, "/image?label=0")
        assert Held.started.wait(60)
        waiting = [pool.submit(get, port, "/image?label=1") for _ in range(2)]
        wait_until(lambda: json.loads(get(port, "/healthz")[2])["waiting"] == 2)
        status, headers, body = get(port, "/image?label=2")
        assert status == 503
        assert headers["retry-after"] == "1"
        assert b"2 pictures are waiting, of at most 2" in body
        Held.allowed.set()
        assert [done.result()[0] for done in (first, *waiting)] == [200, 200, 200]


class Failing(OnnxStudent):
    """A student whose first call fails."""

    failures = 1

    def sample(self, *args: Any, **settings: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out of memory")
        return super().sample(*args, **settings)


def test_a_failed_batch_does_not_end_the_service(path: Path) -> None:
    with running(Failing(path)) as port:
        assert get(port, "/image?label=0")[0] == 500
        assert get(port, "/image?label=0")[0] == 200


def test_latents_are_refused(tmp_path: Path) -> None:
    export_onnx(tiny_student(1, history_layers=0), tmp_path / "student.onnx")
    with pytest.raises(InputError, match="latents of 2 channels; export it with --vae"):
        app.make_app(OnnxStudent(tmp_path / "student.onnx"))


def test_limits_that_are_none_are_refused() -> None:
    for limits, message in (
        (dict(max_batch=0), "--max-batch is 0; expected at least 1"),
        (dict(max_queue=0), "--max-queue is 0; expected at least 1"),
        (dict(max_wait=-1.0), "--max-wait is -1.0; expected at least 0"),
        (dict(max_wait=math.nan), "--max-wait is nan"),
        (dict(max_request=10), "--max-request is 10; expected at least 256"),
        (dict(time_limit=0.0), "--time-limit is 0.0; expected a number of seconds"),
        (dict(max_count=5, max_queue=4), "--max-count is 5; expected at most --max-queue, 4"),
    ):
        with pytest.raises(InputError, match=message):
            app.Limits(**limits)


def closed_after(port: int, *pieces: bytes, pause: float = 0.0) -> tuple[float, bytes]:
    """Seconds until the service closes a connection that sends these pieces and then waits; and what it answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        begun, answer = time.monotonic(), b""
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:
                break
            time.sleep(pause)
        while True:
            try:
                piece = connection.recv(4096)
            except ConnectionResetError:
                piece = b""
            if not piece:
                return time.monotonic() - begun, answer
            answer += piece


@pytest.mark.slow
def test_half_a_request_is_not_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.ImpatientProtocol, "seconds", 0.5)
    whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with running(OnnxStudent(path)) as port:
        for pieces in ((), (whole[:20],), (whole[:-2],)):
            assert 0.4 < closed_after(port, *pieces)[0] < 20, pieces
        body = b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        assert closed_after(port, body, b"half of the body")[0] < 20
        # Neither a byte now and then nor a request before it buys more time.
        assert closed_after(port, *[whole[i : i + 1] for i in range(20)], pause=0.1)[0] < 20
        seconds, answer = closed_after(port, whole, whole[:20])
        assert seconds < 20
        assert b"200 OK" in answer
        assert get(port, "/healthz")[0] == 200


def test_an_answer_may_take_longer_than_a_request(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.ImpatientProtocol, "seconds", 0.2)
    Held.allowed.clear()
    with running(Held(path)) as port, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(get, port, "/image?label=0")
        time.sleep(1)
        Held.allowed.set()
        assert answer.result()[0] == 200


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(EXAMPLE), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def test_a_busy_port_and_a_missing_model_are_one_line(path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        busy = run_script(str(path), "--port", str(port))
    assert busy.stderr == (
        f"serve.py: error: cannot listen on 127.0.0.1 port {port} (Address already in use); choose another --port or --host\n"
    )
    for words, message in (
        ((str(tmp_path / "none.onnx"),), "none.onnx: no such file"),
        ((str(path), "--port", "70000"), "cannot listen on 127.0.0.1 port 70000"),
        ((str(path), "--patience", "nan"), "--patience is nan"),
    ):
        done = run_script(*words)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")
        assert message in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
def test_the_script_answers_what_it_took_when_it_is_told_to_stop(path: Path) -> None:
    port = free_port()
    command = [sys.executable, str(EXAMPLE), str(path), "--port", str(port), "--max-wait", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        wait_until(lambda: process.poll() is not None or answers(port))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(get, port, "/image?label=4")
            time.sleep(1)  # now it waits for others to be drawn with
            process.send_signal(signal.SIGTERM)
            status, _, body = answer.result()
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert status == 200, errors
    assert body.startswith(b"\x89PNG")
    assert process.returncode in (0, -signal.SIGTERM)
    assert "sampler of 2 steps, fp32, on CPUExecutionProvider" in output


def test_it_needs_no_torch(path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r}); import serve; from service.drawing import Drawer, png; "
        f"drawer = Drawer(serve.open_student({str(path)!r})); png(*drawer.draw([1], drawer.noise(0, 0))); "
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
