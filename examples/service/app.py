"""The routes: /image, /healthz, /info and /metrics."""

# No `from __future__ import annotations`: FastAPI could not read annotations that name variables of a function.
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pyard.errors import InputError
from pyard.runtime import OnnxPipeline, OnnxStudent
from service.batches import Batches, Job
from service.drawing import Drawer, png
from service.orders import Limits, Order, order_type, too_large

BOUNDARY = "picture"


class Metrics:
    """What /metrics tells Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        one = dict(registry=self.registry)
        self.requests = Counter("pyard_requests", "Answers of /image, by status", ["status"], **one)
        self.seconds = Histogram("pyard_request_seconds", "From a request of /image to its answer", **one)
        self.batch = Histogram("pyard_batch_size", "Pictures drawn together", buckets=(1, 2, 4, 8, 16, 32, 64), **one)
        self.draw_seconds = Histogram("pyard_draw_seconds", "Drawing a batch", **one)
        self.waiting = Gauge("pyard_waiting", "Pictures that wait to be drawn", **one)

    def drawn(self, size: int, seconds: float) -> None:
        self.batch.observe(size)
        self.draw_seconds.observe(seconds)


def make_app(student: OnnxStudent | OnnxPipeline, limits: Limits | None = None) -> FastAPI:
    """The service.

    Args:
        student: see `Drawer`.
        limits: of requests, batches and time.
    """
    limits = limits or Limits()
    drawer, metrics = Drawer(student, limits.min_batch), Metrics()
    batches = Batches(drawer, limits.max_batch, limits.max_wait, limits.max_queue, metrics.drawn)
    metrics.waiting.set_function(lambda: batches.waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        drawing = asyncio.create_task(batches.draw_for_ever())
        yield  # uvicorn comes back when every request it took has been answered
        drawing.cancel()

    app = FastAPI(title="pyard", lifespan=lifespan)

    @app.exception_handler(InputError)
    async def wrong_input(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=400)

    @app.middleware("http")
    async def watch(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        begin, status = time.perf_counter(), 500
        try:
            response = too_large(request, limits.max_request) or await answer(request)
            status = response.status_code
            return response
        finally:
            if request.url.path == "/image":
                metrics.requests.labels(status).inc()
                metrics.seconds.observe(time.perf_counter() - begin)

    read_order = order_type(drawer.num_classes, limits)

    @app.get("/image", response_class=Response, responses={200: {"content": {"image/png": {}}}, 400: {}, 503: {}, 504: {}})
    async def image(order: Annotated[Order, Depends(read_order)], previews: bool = False) -> Response:
        """Pictures of a class or a prompt. With `previews`, a new part replaces the last one after each step."""
        if previews and not drawer.has_previews:
            raise InputError("previews need a student that was exported with --form step, or a folder with --form both")
        jobs = [Job(order.what, drawer.noise(order.seed, i), previews) for i in range(order.count)]
        if not batches.add(jobs):
            detail = f"{batches.waiting} pictures are waiting, of at most {limits.max_queue}; try again"
            raise HTTPException(503, detail, headers={"Retry-After": "1"})
        deadline = asyncio.get_running_loop().time() + limits.time_limit
        first, together = await pictures(jobs, deadline)
        headers = {"X-Batch-Size": str(together)}
        if not previews:
            return Response(first, media_type="image/png", headers=headers)
        kind = f"multipart/x-mixed-replace; boundary={BOUNDARY}"
        return StreamingResponse(parts(first, jobs, deadline), media_type=kind, headers=headers)

    async def pictures(jobs: list[Job], deadline: float) -> tuple[bytes, int]:
        """The next picture of each job, side by side, and the largest batch that one was drawn in."""
        try:
            async with asyncio.timeout_at(deadline):
                done = [await job.next() for job in jobs]
        except BaseException as error:  # a picture of them could not be drawn, or the client has gone
            leave(jobs)
            if isinstance(error, TimeoutError):
                raise HTTPException(504, f"not drawn within {limits.time_limit:g} s") from None
            raise
        return png(*(picture for picture, _ in done)), max(together for _, together in done)

    async def parts(first: bytes, jobs: list[Job], deadline: float) -> AsyncIterator[bytes]:
        """A part for each step. The boundary follows at once: browsers show a part when they see where it ends."""
        try:
            yield f"--{BOUNDARY}\r\n".encode()
            for step in range(drawer.steps):
                picture = (await pictures(jobs, deadline))[0] if step else first
                head = f"Content-Type: image/png\r\nContent-Length: {len(picture)}\r\n\r\n".encode()
                end = f"\r\n--{BOUNDARY}{'--' if step == drawer.steps - 1 else ''}\r\n".encode()
                yield head + picture + end
        except HTTPException:
            pass  # too late for another status; a client sees that the last boundary is missing
        finally:
            leave(jobs)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "waiting": batches.waiting}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return drawer.about()

    @app.get("/metrics", response_class=Response)
    async def of_prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def leave(jobs: list[Job]) -> None:
    for job in jobs:
        job.gone = True
