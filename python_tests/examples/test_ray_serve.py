"""The service on a local Ray: two replicas draw, one is killed while clients wait, and every client gets its picture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from factories import digits_student
from services import EXAMPLE, answers, free_port, get, wait_until

from pyard.export import export_onnx

pytest.importorskip("ray.serve", reason="the extra 'ray' is not installed: pip install '.[ray]'")
psutil = pytest.importorskip("psutil")  # ray needs it

SCRIPT = EXAMPLE.with_name("ray_serve.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
CLIENTS = 16


@contextmanager
def running(student: Path, log: Path, *flags: str) -> Iterator[tuple[int, psutil.Process]]:
    """The script's port and process, once it answers."""
    port = free_port()
    command = [sys.executable, str(SCRIPT), str(student), "--port", str(port), *flags]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file, cwd=log.parent)
    children = []
    try:
        wait_until(lambda: process.poll() is not None or answers(port), seconds=180)
        assert process.poll() is None, log.read_text()
        wait_until(lambda: "replicas on http" in log.read_text(), seconds=120)
        children = psutil.Process(process.pid).children(recursive=True)
        yield port, psutil.Process(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) in (0, -signal.SIGTERM), log.read_text()
    finally:
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()


def painters(script: psutil.Process) -> set[int]:
    """Processes that draw."""
    found = set()
    for child in script.children(recursive=True):
        try:
            if "ServeReplica:pyard:Painter" in " ".join(child.cmdline()):
                found.add(child.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")
def test_no_request_is_lost_when_a_replica_is_killed(tmp_path: Path) -> None:
    export_onnx(digits_student(), tmp_path / "student.onnx")
    found: list[tuple[int, int, bytes]] = []
    stop = threading.Event()
    with running(tmp_path / "student.onnx", tmp_path / "log", "--max-wait", "0.2", "--max-batch", "4") as (port, script):
        wait_until(lambda: len(painters(script)) == 2, seconds=120)

        def client(number: int) -> None:
            while not stop.is_set():
                status, _, body = get(port, f"/image?label={number % 10}&seed={number}")
                found.append((number, status, body))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in clients:
            thread.start()
        wait_until(lambda: len(found) > 4 * CLIENTS)
        first = painters(script)
        for _ in range(2):  # whichever it is, it holds requests then: more clients wait than a batch has places
            os.kill(min(painters(script) & first), signal.SIGKILL)
            begun = len(found)
            wait_until(lambda begun=begun: len(found) > begun + 4 * CLIENTS)
            wait_until(lambda: len(painters(script)) == 2, seconds=120)
        time.sleep(1)
        stop.set()
        for thread in clients:
            thread.join(60)
        assert not painters(script) & first, "both first replicas were killed, and Ray started others"
        status, _, body = get(port, "/healthz")
        assert (status, json.loads(body)) == (200, {"status": "ok"})
    assert {status for _, status, _ in found} == {200}
    pictures = {number: {body for other, _, body in found if other == number} for number in range(CLIENTS)}
    assert all(len(different) == 1 for different in pictures.values()), "equal requests, equal bytes, whichever replica draws"
    assert len(set.union(*pictures.values())) == CLIENTS


@pytest.mark.slow
def test_requests_are_limited_as_on_one_machine(tmp_path: Path) -> None:
    export_onnx(digits_student(), tmp_path / "student.onnx")
    with running(tmp_path / "student.onnx", tmp_path / "log", "--replicas", "1", "--time-limit", "20") as (port, _):
        status, headers, body = get(port, "/image?label=3&seed=1&count=2")
        assert (status, headers["content-type"], body[:4]) == (200, "image/png", b"\x89PNG")
        for query, status, message in (
            ("label=10", 400, "label 10: expected 0 to 9"),
            ("label=1&seed=-3", 400, "seed is -3"),
            ("label=cat", 422, "valid integer"),
            ("label=1&count=5", 422, "less than or equal to 4"),
            (f"label=1&x={'a' * 20000}", 431, "at most 16384"),
        ):
            found, _, body = get(port, f"/image?{query}")
            assert (found, message in body.decode()) == (status, True), query


def test_wrong_flags_are_one_line(tmp_path: Path) -> None:
    for words, message in (
        ((str(tmp_path / "none.onnx"),), "none.onnx: no such file"),
        (("x.onnx", "--replicas", "0"), "--replicas 0"),
        (("x.onnx", "--replicas", "3", "--max-replicas", "2"), "--max-replicas 2"),
    ):
        command = [sys.executable, str(SCRIPT), *words]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert message in done.stderr
