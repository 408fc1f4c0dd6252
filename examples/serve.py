"""Serve an exported student over HTTP: concurrent requests are drawn together, answers are PNG pictures. No PyTorch.

pip install '.[serve]'
python examples/serve.py student.onnx --port 8000     # a student of classes
curl 'http://127.0.0.1:8000/image?label=3&seed=1' -o three.png
python examples/serve.py scenes/ --port 8000          # a text-to-image student
curl 'http://127.0.0.1:8000/image?prompt=a+red+circle&seed=1' -o circle.png
"""

from __future__ import annotations

import argparse
import sys

import uvicorn
from service.app import make_app
from service.connections import ImpatientProtocol, listen
from service.drawing import open_student
from service.orders import add_limits, limits_of

from pyard.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="a file, or the folder of a text-to-image student, written by python -m pyard.export")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, help="CPU threads for a batch (OMP_NUM_THREADS, or onnxruntime's choice)")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds that a client may take to send its request")
    add_limits(parser)
    options = parser.parse_args()
    ImpatientProtocol.seconds = options.patience
    try:
        if not 0 < options.patience < float("inf"):
            raise InputError(f"--patience is {options.patience}; expected a number of seconds")
        limits = limits_of(options)
        student = open_student(options.student, options.threads)
        app = make_app(student, limits)
        listening = listen(options.host, options.port)
    except InputError as error:
        sys.exit(f"serve.py: error: {' '.join(str(error).split())}")
    print(student, flush=True)
    uvicorn.Server(uvicorn.Config(app, http=ImpatientProtocol)).run(sockets=[listening])


if __name__ == "__main__":
    main()
