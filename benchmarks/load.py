"""How the services hold under load: latencies and pictures a second at 1, 8 and 64 clients.

    python -m benchmarks.load student.onnx            # or the folder of a text-to-image student

`examples/serve.py` as it is, `examples/ray_serve.py` with two replicas (where Ray is installed), and `serve.py` drawing one
picture at a time. All three run at once and take turns; each client sends its next request when it has its picture. Clients,
services and whatever else runs share the machine's cores, so compare rows of one table only. Writes load.json and load.md.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from pyard.bench.machine import cores, processor

RESULTS = Path(__file__).parent / "results"
EXAMPLES = Path(__file__).parents[1] / "examples"
ONE, BATCHES, RAY = "serve.py, one at a time", "serve.py", "ray_serve.py, 2 replicas"
SERVICES = {
    ONE: ("serve.py", "--max-batch", "1", "--min-batch", "1", "--max-wait", "0", "--max-queue", "1000"),
    BATCHES: ("serve.py", "--max-queue", "1000"),
    RAY: ("ray_serve.py", "--replicas", "2", "--max-queue", "1000"),
}
PROMPTS = ("a red circle", "a blue square above a green circle", "two yellow triangles", "a large green cross")


def start(student: Path, words: tuple[str, ...], stack: ExitStack) -> int:
    """Run a service until the stack is closed; its port, once it has drawn a picture."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    script, *flags = words
    command = [sys.executable, str(EXAMPLES / script), str(student), "--port", str(port), "--threads", "1", *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.send_signal, signal.SIGTERM)
    deadline = time.monotonic() + 180
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", query(student, 0))
            if connection.getresponse().status == 200:
                return port
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{' '.join(command)} does not answer; run it on its own to see why")
        time.sleep(0.3)


def query(student: Path, number: int) -> str:
    what = f"prompt={quote(PROMPTS[number % len(PROMPTS)])}" if student.is_dir() else f"label={number % 10}"
    return f"/image?{what}&seed={number}"


def load(student: Path, port: int, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each request, and pictures a second."""
    latencies: list[float] = []
    numbers = itertools.count()
    stop = time.monotonic() + seconds

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.monotonic() < stop:
            begin = time.perf_counter()
            connection.request("GET", query(student, next(numbers)))
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"a request was answered {answer.status}")
            latencies.append(time.perf_counter() - begin)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, len(latencies) / (time.perf_counter() - begin)


def measure(student: Path, clients: list[int], seconds: float, rounds: int) -> list[dict[str, Any]]:
    names = [name for name in SERVICES if name != RAY or importlib.util.find_spec("ray") is not None]
    found: dict[tuple[int, str], list[tuple[list[float], float]]] = {}
    with ExitStack() as stack:
        ports = {name: start(student, SERVICES[name], stack) for name in names}
        for turn in range(rounds + 1):
            for count, name in itertools.product(clients, names):
                both = load(student, ports[name], count, seconds if turn else 1.0)
                if turn:
                    found.setdefault((count, name), []).append(both)
    rows = []
    for (count, name), results in found.items():
        latencies = np.concatenate([some for some, _ in results])
        p50, p95, p99 = (1000 * float(np.percentile(latencies, share)) for share in (50, 95, 99))
        rates = [rate for _, rate in results]
        alone = [rate for _, rate in found[count, ONE]]
        row = dict(clients=count, service=name, p50=p50, p95=p95, p99=p99, pictures_a_second=float(np.median(rates)))
        row["times_one_at_a_time"] = float(np.median(np.divide(rates, alone)))
        rows.append({**row, "rates": rates})
    return rows


def table(results: dict[str, Any]) -> str:
    lines = []
    for name, result in results.items():
        lines += [
            f"`{name}`:",
            "",
            "| clients | service | p50 ms | p95 ms | p99 ms | pictures a second | against one at a time |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            times = " | ".join(f"{row[key]:.0f}" for key in ("p50", "p95", "p99"))
            rates = f"{row['pictures_a_second']:.0f} | {row['times_one_at_a_time']:.2f}x"
            lines.append(f"| {row['clients']} | {row['service']} | {times} | {rates} |")
        machine = result["machine"]
        lines += [
            "",
            f"{machine['processor']}, {machine['cores']} cores, load average {machine['load_average']} before the first round;",
            f"one thread a batch, {result['rounds']} rounds of {result['seconds']:g} s. Medians of the rounds.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a round, for one number of clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "load.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    machine = dict(processor=processor(), cores=cores(), load_average=round(os.getloadavg()[0], 1))
    rows = measure(options.student.resolve(), options.clients, options.seconds, options.rounds)
    results[options.student.name] = dict(machine=machine, seconds=options.seconds, rounds=options.rounds, rows=rows)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
