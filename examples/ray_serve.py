"""Serve an exported student on several processes or machines with Ray Serve: replicas, batches and autoscaling are Ray's.

pip install '.[ray]'
python examples/ray_serve.py student.onnx --port 8000 --replicas 2
curl 'http://127.0.0.1:8000/image?label=3&seed=1' -o three.png

On a cluster (`ray start` on every machine), run it on one of them: it joins the cluster. Every machine needs the student at
the same path, and what `pip install` installed.
"""

# No `from __future__ import annotations`: FastAPI could not read annotations that name variables of a function.
import argparse
import asyncio
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from service.drawing import Drawer, open_student, png
from service.orders import Limits, Order, add_limits, limits_of, order_type, too_large

from pyard.errors import InputError

APP = "pyard"
TRIES = 5  # of a picture whose replica dies


@serve.deployment
class Painter:
    """A replica: it holds the student and draws batches."""

    def __init__(self, path: str, threads: int, limits: Limits):
        self.drawer = Drawer(open_student(path, threads), limits.min_batch)
        self.draw.set_max_batch_size(limits.max_batch)
        self.draw.set_batch_wait_timeout_s(limits.max_wait)

    @serve.batch
    async def draw(self, orders: list[tuple[Order, int]]) -> list[tuple[Any, int]]:
        """The picture of each order and number in it, and how many were drawn together."""
        noise = np.concatenate([self.drawer.noise(order.seed, index) for order, index in orders])
        pictures = await asyncio.to_thread(self.drawer.draw, [order.what for order, _ in orders], noise)
        return [(picture, len(orders)) for picture in pictures]


def routes(num_classes: int | None, limits: Limits) -> Callable[[], FastAPI]:
    """/image and /healthz as in `serve.py`, but for previews. Every process of the front builds its own."""

    def build() -> FastAPI:
        app = FastAPI(title="pyard")
        painter = serve.get_deployment_handle("Painter", APP)

        @app.exception_handler(InputError)
        async def wrong_input(_: Request, error: InputError) -> JSONResponse:
            return JSONResponse({"detail": str(error)}, status_code=400)

        @app.middleware("http")
        async def refuse_large(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
            return too_large(request, limits.max_request) or await answer(request)

        async def picture(order: Order, index: int) -> tuple[Any, int]:
            # The same order gives the same picture, so it may be drawn again.
            for _ in range(TRIES - 1):
                try:
                    return await painter.draw.remote((order, index))
                except RayActorError:
                    await asyncio.sleep(0.1)
            return await painter.draw.remote((order, index))

        @app.get("/image", response_class=Response, responses={200: {"content": {"image/png": {}}}, 400: {}, 503: {}, 504: {}})
        async def image(order: Annotated[Order, Depends(order_type(num_classes, limits))]) -> Response:
            try:
                async with asyncio.timeout(limits.time_limit):
                    drawn = await asyncio.gather(*(picture(order, index) for index in range(order.count)))
            except TimeoutError:
                raise HTTPException(504, f"not drawn within {limits.time_limit:g} s") from None
            except BackPressureError:
                detail = f"{limits.max_queue} pictures are waiting; try again"
                raise HTTPException(503, detail, headers={"Retry-After": "1"}) from None
            together = max(size for _, size in drawn)
            pictures = png(*(one for one, _ in drawn))
            return Response(pictures, media_type="image/png", headers={"X-Batch-Size": str(together)})

        @app.get("/healthz")
        async def healthz() -> dict[str, Any]:
            return {"status": "ok"}

        return app

    return build


def application(path: str, threads: int, gpus: float, replicas: tuple[int, int], fronts: int, limits: Limits) -> Any:
    """What Ray runs: a few processes that take requests, and from `replicas[0]` to `replicas[1]` that draw."""
    least, most = replicas
    num_classes = Drawer(open_student(path, threads)).num_classes
    painter = Painter.options(
        autoscaling_config=dict(min_replicas=least, max_replicas=most, target_ongoing_requests=limits.max_batch),
        max_ongoing_requests=2 * limits.max_batch,  # a batch is drawn while the next one comes together
        max_queued_requests=limits.max_queue,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
    )
    front = serve.deployment(serve.ingress(routes(num_classes, limits))(), name="Front")
    options = dict(num_replicas=fronts, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    return front.options(**options).bind(painter.bind(path, threads, limits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="a file, or the folder of a text-to-image student, written by python -m pyard.export")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=2, help="processes that draw (2)")
    parser.add_argument("--max-replicas", type=int, help="how many replicas Ray may start under load (as many as --replicas)")
    parser.add_argument("--fronts", type=int, default=1, help="processes that take requests (1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one replica (1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of one replica; 0.5 puts two on one GPU (0)")
    add_limits(parser)
    options = parser.parse_args()
    replicas = (options.replicas, options.max_replicas or options.replicas)
    try:
        if not 1 <= replicas[0] <= replicas[1] or options.fronts < 1:
            raise InputError(
                f"--replicas {replicas[0]}, --max-replicas {replicas[1]}, --fronts {options.fronts}; expected 1 or more"
            )
        path = str(Path(options.student).resolve())
        app = application(path, options.threads, options.gpus, replicas, options.fronts, limits_of(options))
    except InputError as error:
        sys.exit(f"ray_serve.py: error: {' '.join(str(error).split())}")
    stop = threading.Event()
    ray.init(runtime_env={"py_modules": [str(Path(__file__).parent / "service")]}, log_to_driver=False)
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(app, name=APP, route_prefix="/")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(f"{options.student}: {replicas[0]} replicas on http://{options.host}:{options.port}", flush=True)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
