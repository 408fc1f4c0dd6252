"""What a request to the example service may ask for, what it may not, and what is counted."""

from __future__ import annotations

import email
import email.policy
import http.client
import importlib
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from services import get, grey_student, running, wait_until

from pyard.errors import InputError
from pyard.export import export_onnx
from pyard.runtime import OnnxPipeline, OnnxStudent

drawing: Any = importlib.import_module("service.drawing")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("serve") / "student.onnx"
    export_onnx(grey_student(), file)
    return file


@pytest.fixture(scope="module")
def step_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("serve") / "step.onnx"
    export_onnx(grey_student(), file, form="step")
    return file


def parts_of(headers: dict[str, str], body: bytes) -> list[bytes]:
    """The pictures of a multipart answer."""
    head = f"Content-Type: {headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    assert message.is_multipart()
    assert not message.defects
    parts = list(message.iter_parts())
    assert {part.get_content_type() for part in parts} == {"image/png"}
    return [part.get_payload(decode=True) for part in parts]


def test_pictures_of_one_request_are_side_by_side(path: Path) -> None:
    student = OnnxStudent(path, threads=1)
    with running(student, max_count=3) as port:
        status, _, body = get(port, "/image?label=2&seed=9&count=3")
        assert get(port, "/image?label=2&count=4")[0] == 422
        assert get(port, "/image?label=2&count=0")[0] == 422
    assert status == 200
    expected = student.sample([2, 2, 2], seed=9)[:, 0].clip(-1, 1)
    found = np.asarray(Image.open(io.BytesIO(body))).astype(int)
    assert found.shape == (8, 24)
    assert np.abs(found - (np.concatenate(list(expected), axis=1) + 1) * 127.5).max() <= 1


def test_previews_replace_each_other_and_the_last_is_the_picture(path: Path, step_path: Path) -> None:
    student = OnnxStudent(step_path, threads=1)
    with running(student) as port, ThreadPoolExecutor(8) as pool:
        # Plain requests between them belong to other batches.
        wanted = [f"/image?label=1&seed={seed}&count=2&previews={seed % 2}" for seed in range(8)]
        answers = list(pool.map(lambda one: get(port, one), wanted))
        plain = [get(port, f"/image?label=1&seed={seed}&count=2")[2] for seed in range(8)]
    for seed, (status, headers, body) in enumerate(answers):
        assert status == 200
        if seed % 2:
            assert headers["content-type"].startswith("multipart/x-mixed-replace")
            first, last = parts_of(headers, body)
            assert first != last
            body = last
        found, expected = (np.asarray(Image.open(io.BytesIO(one))).astype(int) for one in (body, plain[seed]))
        assert found.std() > 5
        assert np.abs(found - expected).max() <= 1
    with running(OnnxStudent(path)) as port:
        status, _, body = get(port, "/image?label=1&previews=true")
    assert status == 400
    assert b"--form step" in body


def test_a_preview_comes_before_the_next_is_drawn(step_path: Path) -> None:
    class Slow(OnnxStudent):
        allowed = threading.Event()

        def stream(self, *args: Any, **settings: Any) -> Any:
            for number, pictures in enumerate(super().stream(*args, **settings)):
                assert number == 0 or self.allowed.wait(60)
                yield pictures

    with running(Slow(step_path)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/image?label=1&previews=1")
        answer = connection.getresponse()
        begun = b""
        while not (b"IEND" in begun and begun.endswith(b"\r\n--picture\r\n")):  # browsers wait for the next boundary
            begun += answer.read1()
        Slow.allowed.set()
        rest = answer.read()
        connection.close()
    assert rest.count(b"IEND") == 1
    assert rest.endswith(b"--picture--\r\n")


class Held(OnnxStudent):
    """A student that draws when it is allowed to, and counts what it draws."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.allowed, self.drawn = threading.Event(), 0

    def sample(self, labels: Any, **settings: Any) -> Any:
        assert self.allowed.wait(60)
        self.drawn += len(labels)
        return super().sample(labels, **settings)


def test_what_is_not_drawn_in_time_is_said_and_no_longer_drawn(path: Path) -> None:
    student = Held(path)
    with running(student, time_limit=0.5, max_batch=2) as port, ThreadPoolExecutor(6) as pool:
        begin = time.monotonic()
        answers = list(pool.map(lambda seed: get(port, f"/image?label=1&seed={seed}"), range(6)))
        assert 0.4 < time.monotonic() - begin < 30
        assert [status for status, _, _ in answers] == [504] * 6
        assert b"not drawn within 0.5 s" in answers[0][2]
        student.allowed.set()
        wait_until(lambda: get(port, "/image?label=1")[0] == 200)
    assert student.drawn == 4, "the batch that had begun, and the last request with its copy; not the four that had waited"


def test_a_request_for_more_than_can_wait_takes_no_place(path: Path) -> None:
    student = Held(path)
    with running(student, max_batch=1, max_queue=2, max_count=2) as port, ThreadPoolExecutor(2) as pool:
        first = pool.submit(get, port, "/image?label=0")
        wait_until(lambda: metrics(port)["pyard_waiting"] == 0)
        second = pool.submit(get, port, "/image?label=0")
        wait_until(lambda: metrics(port)["pyard_waiting"] == 1)
        assert get(port, "/image?label=0&count=2")[0] == 503
        assert metrics(port)["pyard_waiting"] == 1
        student.allowed.set()
        assert (first.result()[0], second.result()[0]) == (200, 200)


def test_large_requests_are_refused(path: Path) -> None:
    with running(OnnxStudent(path), max_request=1000) as port:
        assert get(port, f"/image?label=1&x={'a' * 1000}")[0] == 431
        for body in (b"Content-Length: 2000\r\n\r\n" + b"x" * 2000, b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(b"GET /image?label=1 HTTP/1.1\r\nHost: x\r\n" + body)
                assert b" 413 " in connection.recv(4096).splitlines()[0]
        assert get(port, "/image?label=1")[0] == 200


def metrics(port: int) -> dict[str, float]:
    status, headers, body = get(port, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    lines = [line.rpartition(" ") for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics_count_answers_batches_and_seconds(path: Path) -> None:
    with running(OnnxStudent(path)) as port:
        for query in ("label=1", "label=2&count=3", "label=99"):
            get(port, f"/image?{query}")
        found = metrics(port)
    assert found['pyard_requests_total{status="200"}'] == 2
    assert found['pyard_requests_total{status="400"}'] == 1
    assert found["pyard_request_seconds_count"] == 3
    assert found["pyard_request_seconds_sum"] > 0
    assert found["pyard_batch_size_sum"] == 4
    assert 0 < found["pyard_draw_seconds_sum"] < 60


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_equal_requests_give_equal_bits_whatever_else_is_drawn(precision: Any, path: Path, tmp_path: Path) -> None:
    export_onnx(grey_student(), tmp_path / "student.onnx", precision=precision)
    drawer = drawing.Drawer(OnnxStudent(tmp_path / "student.onnx", threads=1))
    labels, noise = [i % 5 for i in range(12)], [drawer.noise(i, 0) for i in range(12)]
    alone = [drawer.draw([label], one)[0] for label, one in zip(labels, noise, strict=True)]
    generator = np.random.default_rng(0)
    for size in [*range(2, 9)] * 6:
        chosen = generator.integers(0, 12, size)
        together = drawer.draw([labels[i] for i in chosen], np.concatenate([noise[i] for i in chosen]))
        for i, picture in zip(chosen, together, strict=True):
            np.testing.assert_array_equal(picture, alone[i])


@pytest.mark.slow
def test_prompts(tmp_path: Path) -> None:
    from factories import scenes_student

    from pyard.export.pipeline import export_pipeline

    export_pipeline(scenes_student(), tmp_path / "scenes")
    pipeline = OnnxPipeline(tmp_path / "scenes", threads=1)
    texts = ["a red circle", "a large green square above a small blue circle", "two yellow triangles"]
    with running(pipeline, max_wait=0.5, max_prompt=60) as port, ThreadPoolExecutor(6) as pool:
        wanted = [f"/image?prompt={text.replace(' ', '+')}&seed=5" for text in texts]
        answers = list(pool.map(lambda one: get(port, one), wanted * 2))
        status, headers, body = get(port, f"{wanted[0]}&previews=1")
        assert get(port, "/image?label=3")[0] == 422
        assert get(port, f"/image?prompt={'a' * 61}")[0] == 422
        about = get(port, "/info")
    assert about[0] == 200
    assert b'"num_steps":3' in about[2]
    for text, answer, same in zip(texts, answers[:3], answers[3:], strict=True):
        assert answer[0] == 200
        assert answer[2] == same[2]
        expected = pipeline.sample([text], seed=5)[0].astype(int)
        found = np.asarray(Image.open(io.BytesIO(answer[2]))).astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1
    assert max(int(answer[1]["x-batch-size"]) for answer in answers) > 1
    pictures = parts_of(headers, body)
    assert (status, len(pictures)) == (200, 3)
    assert (
        np.abs(np.asarray(Image.open(io.BytesIO(pictures[-1]))).astype(int) - pipeline.sample([texts[0]], seed=5)[0]).max() <= 1
    )
    config = json.loads((tmp_path / "scenes/config.json").read_text(encoding="utf-8"))
    (tmp_path / "scenes/config.json").write_text(json.dumps({**config, "text": None}), encoding="utf-8")
    with pytest.raises(InputError, match="without text encoders"):
        drawing.Drawer(OnnxPipeline(tmp_path / "scenes"))
