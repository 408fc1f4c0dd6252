"""What a request may ask for."""

# No `from __future__ import annotations`: FastAPI could not read annotations that name variables of a function.
import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import JSONResponse

from pyard.diffusion.noise import check_labels, standard_normal
from pyard.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What the service takes on; the command line of `serve.py` has a flag for each.

    Args:
        max_batch: pictures that are drawn together.
        min_batch: see `Drawer`.
        max_wait: seconds that the first of a batch waits for others.
        max_queue: pictures that may wait; a request for more is answered 503 at once.
        max_count: pictures of one request.
        max_prompt: characters of a prompt.
        max_request: bytes of a request: its address, headers and body.
        time_limit: seconds from a request to its whole answer; then it is answered 504.
    """

    max_batch: int = 8
    min_batch: int = 2
    max_wait: float = 0.01
    max_queue: int = 64
    max_count: int = 4
    max_prompt: int = 1000
    max_request: int = 16384
    time_limit: float = 60.0

    def __post_init__(self) -> None:
        for name, least in dict(
            max_batch=1, min_batch=1, max_wait=0, max_queue=1, max_count=1, max_prompt=1, max_request=256
        ).items():
            if not least <= getattr(self, name) < float("inf"):
                raise InputError(f"{_flag(name)} is {getattr(self, name)}; expected at least {least}")
        if not 0 < self.time_limit < float("inf"):
            raise InputError(f"{_flag('time_limit')} is {self.time_limit}; expected a number of seconds, more than 0")
        if self.max_count > self.max_queue:
            raise InputError(
                f"{_flag('max_count')} is {self.max_count}; expected at most {_flag('max_queue')}, {self.max_queue}"
            )


HELP = {
    "max_batch": "pictures drawn together, at most",
    "min_batch": "a smaller batch is filled with copies; with 2, equal requests give equal bytes",
    "max_wait": "seconds that a request waits for others to join its batch",
    "max_queue": "pictures that may wait; requests beyond that get status 503",
    "max_count": "pictures in one request, at most",
    "max_prompt": "characters in a prompt, at most",
    "max_request": "bytes in a request, at most",
    "time_limit": "seconds until a request gets status 504",
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_limits(parser: argparse.ArgumentParser) -> None:
    """A flag for each limit."""
    for name, text in HELP.items():
        default = getattr(Limits, name)
        parser.add_argument(_flag(name), type=type(default), default=default, help=f"{text} ({default})")


def limits_of(options: argparse.Namespace) -> Limits:
    """InputError: a number out of range."""
    return Limits(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Limits)})


@dataclass(frozen=True)
class Order:
    """What a request asks for."""

    what: int | str
    seed: int
    count: int


def order_type(num_classes: int | None, limits: Limits) -> Callable[..., Order]:
    """A function whose arguments are the fields of a request, as FastAPI reads them; no classes: prompts."""
    counts = Query(ge=1, le=limits.max_count, description="pictures, side by side")

    def of_label(label: int, seed: int = 0, count: Annotated[int, counts] = 1) -> Order:
        check_labels([label], num_classes)
        return checked(Order(label, seed, count))

    def of_prompt(
        prompt: Annotated[str, Query(max_length=limits.max_prompt)], seed: int = 0, count: Annotated[int, counts] = 1
    ) -> Order:
        return checked(Order(prompt, seed, count))

    return of_prompt if num_classes is None else of_label


def checked(order: Order) -> Order:
    standard_normal(order.seed, [0], (1,))  # says what is wrong with a seed
    return order


def too_large(request: Request, most: int) -> JSONResponse | None:
    """The answer to a request of more than `most` bytes; None: it is not."""
    head = len(request.scope["raw_path"]) + len(request.scope["query_string"])
    head += sum(len(name) + len(value) for name, value in request.scope["headers"])
    body = request.headers.get("content-length", "0")
    if head > most:
        return JSONResponse({"detail": f"a request of {head} bytes; at most {most} are read"}, status_code=431)
    if "transfer-encoding" in request.headers or not body.isdigit() or head + int(body) > most:
        return JSONResponse({"detail": f"a body that makes the request longer than {most} bytes"}, status_code=413)
    return None
