"""One table of everything that can run the same requests, in one run: `make bench`.

    python -m benchmarks.table --dtype bfloat16 --clients 1 8 32 64 256

GPT-2's 124M shapes with random weights, 10 prompt tokens and 44 new ones a request, sampling.
First in this process: the matrix products of a step alone, the engine, and Transformers'
``generate`` on a static batch. Then over HTTP, a server after the other: this service with every
record stored, the same without storing, `transformers serve --continuous-batching`, and the naive
service (a pipeline call a request in four threads). What is not installed is skipped and named.
Compare lines of one number of clients; all of them come from the same ten minutes.
"""

import argparse
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import serving
from benchmarks.engine import apart, floors_of, load, run_engine, run_generate
from benchmarks.shapes import write_gpt2
from engine.engine import Engine

PROMPT_TOKENS, MAX_RUNNING = 10, 64
HTTP = {
    "ours": "**this service over HTTP, stored**",
    "unstored": "the same, nothing stored",
    "transformers": "`transformers serve --continuous-batching`",
    "naive": "the naive service",
}
MOST_CLIENTS = {"generate": 64, "transformers": 64, "naive": 32}  # more would only take longer


@dataclass
class Line:
    who: str
    clients: int
    tokens_per_second: float
    first_token: float | None = None  # milliseconds
    gaps: tuple[float, float] | None = None  # milliseconds between tokens: median, 99th percentile
    cpu_seconds: float | None = None  # a thousand tokens
    peak_mib: float | None = None


def in_process(dtype: str, clients: list[int]) -> Iterator[Line]:
    new = serving.NEW_TOKENS
    loaded = apart(load, dtype, 12, "gpt2")
    rows = {count: min(count, MAX_RUNNING) for count in clients}
    for count, floor in apart(floors_of, loaded, sorted(set(rows.values()))).items():
        yield Line("a step's matrix products alone", count, 1000 * count / floor)
    engine = Engine(loaded, max_waiting=1024, max_running=MAX_RUNNING)
    for count in clients:
        cpu, began = time.process_time(), time.perf_counter()
        line = run_engine(engine, count, new)
        tokens = line.tokens_a_second * (time.perf_counter() - began)
        yield Line(
            "**the engine, in process**",
            count,
            line.tokens_a_second,
            line.first_token,
            (line.gap_50, line.gap_99),
            1000 * (time.process_time() - cpu) / tokens,
            serving.peak_mib(os.getpid()),
        )
    engine.close(10)
    for count in [c for c in clients if c <= MOST_CLIENTS["generate"]]:
        speed = apart(run_generate, loaded, count, new)
        yield Line("Transformers' `generate`, static batch", count, speed)


def over_http(name: str, dtype: str, clients: list[int], work: Path) -> Iterator[Line]:
    model = write_gpt2(work / "gpt2-random")
    server = serving.servers(model, dtype)[name]
    with serving.running(server, model, dtype, work) as pid:
        for count in [c for c in clients if c <= MOST_CLIENTS.get(name, c)]:
            server.rounds = 1 if count > 64 else server.rounds
            result = serving.measure(server, model, PROMPT_TOKENS, count, pid)
            first, gaps = None, None
            if name == "ours":
                first, gaps = serving.latencies(server, model, PROMPT_TOKENS, count)
            yield Line(
                HTTP[name],
                count,
                result.tokens_per_second,
                first,
                gaps,
                result.cpu_seconds,
                result.peak_mib,
            )


def machine() -> str:
    """The processor as far as it matters here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if re.search(rf"\b{unit}\b", text)]
    return (
        f"{name[1] if name else 'unknown processor'}, {os.cpu_count()} cores,"
        f" {' '.join(units) or 'no bfloat16 instructions'}, torch {torch.__version__}"
    )


def cells(line: Line, ours: dict[int, float]) -> str:
    def number(value: float | None, digits: int = 0) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    against = ours[line.clients] / line.tokens_per_second if line.clients in ours else None
    gaps = "" if line.gaps is None else f"{line.gaps[0]:.0f}, {line.gaps[1]:.0f}"
    values = [
        str(line.clients),
        line.who,
        number(line.tokens_per_second),
        number(against, 2),
        number(line.first_token),
        gaps,
        number(line.cpu_seconds, 2),
        number(line.peak_mib),
    ]
    return "| " + " | ".join(values) + " |"


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32, 64, 256])
    parser.add_argument("--servers", nargs="*", default=list(HTTP), choices=list(HTTP))
    args = parser.parse_args()
    began = time.monotonic()
    print(f"{machine()}; {args.dtype}")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.servers:
            if name == "transformers" and find_spec("openai") is None:
                print('skipped: transformers serve (pip install "transformers[serving]")')
                continue
            for line in over_http(name, args.dtype, args.clients, Path(folder)):
                lines.append(line)
                print(line, flush=True)
    for line in in_process(args.dtype, args.clients):
        lines.append(line)
        print(line, flush=True)
    show(lines, time.monotonic() - began)


def show(lines: list[Line], seconds: float) -> None:
    ours = {line.clients: line.tokens_per_second for line in lines if line.who == HTTP["ours"]}
    print(f"\n{seconds:.0f} seconds\n")
    print(
        "| clients | | tokens/s | this service is faster by | first token, ms"
        " | between tokens, p50, p99, ms | CPU s a thousand tokens | peak MiB |"
    )
    print("|" + "---|" * 8)
    for line in sorted(lines, key=lambda line: (line.clients, -line.tokens_per_second)):
        print(cells(line, ours))


if __name__ == "__main__":
    main()
