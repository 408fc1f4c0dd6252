"""Serve an exported student over HTTP: concurrent requests are drawn together, answers are PNG pictures. No PyTorch.

pip install '.[serve]'
python examples/serve.py student.onnx --port 8000
curl 'http://127.0.0.1:8000/image?label=3&seed=1' -o three.png
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from pyard.diffusion.noise import check_labels, standard_normal
from pyard.errors import InputError
from pyard.runtime import OnnxStudent


@dataclass(frozen=True)
class Job:
    """A picture that somebody waits for: the answer is the picture and how many were drawn with it."""

    label: int
    noise: NDArray[np.float32]  # [1, C, H, W]
    answer: asyncio.Future[tuple[NDArray[Any], int]]


def make_app(student: OnnxStudent, *, max_batch: int = 8, max_wait: float = 0.01, max_queue: int = 64) -> FastAPI:
    """The service.

    Args:
        student: with one or three channels, or with a decoder (`python -m pyard.export --vae`).
        max_batch: pictures that are drawn together.
        max_wait: seconds that the first of them waits for others.
        max_queue: requests that may wait; one more is answered 503 at once.
    """
    if max_batch < 1 or max_queue < 1 or max_wait < 0:
        raise InputError(f"max_batch is {max_batch}, max_queue {max_queue}, max_wait {max_wait}; expected at least 1, 1 and 0")
    if student.info.num_classes is None:
        raise InputError(
            f"{student.path} is conditioned on {', '.join(map(str, student.info.conditions))}; this service takes classes"
        )
    if not student.info.pictures and student.info.output_shape[0] not in (1, 3):
        raise InputError(f"{student.path} draws latents of {student.info.output_shape[0]} channels; export it with --vae")
    jobs: asyncio.Queue[Job] = asyncio.Queue(max_queue)

    async def draw_for_ever() -> None:
        while True:
            batch = [await jobs.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max_wait):
                    while len(batch) < max_batch:
                        batch.append(await jobs.get())
            noise = np.concatenate([job.noise for job in batch])
            try:
                pictures = await asyncio.to_thread(student.sample, [job.label for job in batch], noise=noise)
                answers = [(picture, len(batch)) for picture in pictures]
            except Exception as error:  # whatever it is, those who wait must hear of it, and the next batch may do better
                for job in batch:
                    job.answer.set_exception(error)
                continue
            for job, answer in zip(batch, answers, strict=True):
                job.answer.set_result(answer)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        drawing = asyncio.create_task(draw_for_ever())
        yield  # uvicorn comes back when every request it took has been answered
        drawing.cancel()

    app = FastAPI(title="pyard", lifespan=lifespan)

    @app.exception_handler(InputError)
    async def wrong_input(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=400)

    @app.get("/image", response_class=Response, responses={200: {"content": {"image/png": {}}}, 400: {}, 503: {}})
    async def image(label: int, seed: int = 0) -> Response:
        """The picture of a class; equal labels and seeds give equal pictures."""
        check_labels([label], student.info.num_classes)
        job = Job(label, standard_normal(seed, [0], student.info.sample_shape), asyncio.get_running_loop().create_future())
        try:
            jobs.put_nowait(job)
        except asyncio.QueueFull:
            raise HTTPException(503, f"{max_queue} requests are waiting; try again", headers={"Retry-After": "1"}) from None
        picture, together = await asyncio.shield(job.answer)
        return Response(png(picture), media_type="image/png", headers={"X-Batch-Size": str(together)})

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "waiting": jobs.qsize()}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return dataclasses.asdict(student.info)

    return app


class ImpatientProtocol(H11Protocol):
    """HTTP of uvicorn, which waits for ever for the rest of a request; this closes the connection after `seconds`."""

    seconds = 10.0
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_or_stop()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_or_stop()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()

    def _wait_or_stop(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._waiting is not None and answering:
            self._waiting.cancel()
            self._waiting = None
        elif self._waiting is None and not answering:
            # Not anew for each byte: one a second would keep a connection for ever.
            self._waiting = self.loop.call_later(self.seconds, self._give_up)

    def _give_up(self) -> None:
        self._waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; an InputError if the port is taken or may not be used, before the service says that it runs."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot listen on {host} port {port} ({reason}); choose another --port or --host") from None


def png(picture: NDArray[Any]) -> bytes:
    """A picture, float32 [C, H, W] from -1 to 1 or uint8 [H, W, 3], as the bytes of a PNG file."""
    if picture.dtype != np.uint8:
        picture = np.round((picture.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        picture = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="file written by python -m pyard.export")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, help="of one batch; onnxruntime's choice if not given")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--max-wait", type=float, default=0.01, help="seconds that a request waits for others")
    parser.add_argument("--max-queue", type=int, default=64, help="waiting requests; more are answered 503")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds that a client may take to send its request")
    options = parser.parse_args()
    ImpatientProtocol.seconds = options.patience
    limits = dict(max_batch=options.max_batch, max_wait=options.max_wait, max_queue=options.max_queue)
    try:
        if not 0 < options.patience < float("inf"):
            raise InputError(f"--patience is {options.patience}; expected a number of seconds")
        student = OnnxStudent(options.student, threads=options.threads)
        app = make_app(student, **limits)
        listening = listen(options.host, options.port)
    except InputError as error:
        sys.exit(f"serve.py: error: {' '.join(str(error).split())}")
    print(student, flush=True)
    uvicorn.Server(uvicorn.Config(app, http=ImpatientProtocol)).run(sockets=[listening])


if __name__ == "__main__":
    main()
