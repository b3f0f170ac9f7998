"""Tokens a second over HTTP: this service against what people would run instead.

    python -m benchmarks.serving                    every server, 1 to 64 clients
    python -m benchmarks.serving --clients 32 --servers ours,naive --dtype bfloat16
    python -m benchmarks.serving --servers unstored,ours --turns 8      small differences

Each line of the table is one number of clients; its servers run one after the other in the same
minutes, each alone on the machine, and are compared as ratios. With ``--turns`` all are up at once
and take turns, so that a machine whose speed changes disturbs them alike; the figures are medians,
the ratio that of the turns' ratios. GPT-2's 124M shapes with random
weights, short prompts, 44 new tokens each, sampling. All traffic stays on the loopback interface.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import httpx

from benchmarks.shapes import write_gpt2

ROOT = Path(__file__).parent.parent
NEW_TOKENS = 44
PROMPT = "Once upon a time there was a little girl who"
PORT = 8765


@dataclass
class Server:
    """How to start one, what to ask it, and how often."""

    command: list[str]
    port: int = PORT
    path: str = "/generate"
    health: str = "/health/ready"
    rounds: int = 3  # requests of each client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def uvicorn(app: str, port: int) -> Server:
    command = [sys.executable, "-m", "uvicorn", app, "--port", str(port), "--log-level", "warning"]
    return Server(command, port)


def servers(model: Path, dtype: str) -> dict[str, Server]:
    transformers, ours, unstored, naive = range(PORT, PORT + 4)
    serve = [str(Path(sys.executable).parent / "transformers"), "serve", str(model)]
    serve += ["--continuous-batching", "--port", str(transformers), "--dtype", dtype]
    serve += ["--device", "cpu"]
    return {
        "ours": uvicorn("main:app", ours),
        "unstored": uvicorn("benchmarks.unstored:app", unstored),
        "naive": replace(uvicorn("benchmarks.naive:app", naive), rounds=1),
        "transformers": Server(serve, transformers, "/v1/completions", "/health", rounds=1),
    }


@contextlib.contextmanager
def running(server: Server, model: Path, dtype: str, work: Path) -> Iterator[int]:
    """Start a server, wait until it answers, and stop it again; its process id."""
    environment = os.environ | {
        "MODEL": str(model),
        "DTYPE": dtype,
        "DATABASE_URL": f"sqlite:///{work / f'{time.monotonic_ns()}.db'}",
        "LOG_LEVEL": "WARNING",
        "MAX_WAITING": "1024",
        "REQUEST_THREADS": "1200",
    }
    with (work / "server.log").open("ab") as output:
        process = subprocess.Popen(
            server.command, cwd=ROOT, env=environment, stdout=output, stderr=output
        )
        try:
            wait_until_ready(process, server)
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(server.url + server.health, timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    raise SystemExit(f"{process.args!r} did not become ready")


@dataclass
class Result:
    tokens_per_second: float
    median_seconds: float
    cpu_seconds: float  # a thousand tokens
    peak_mib: float


def body(server: Server, model: Path, prompt_tokens: int) -> dict[str, object]:
    if server.path == "/generate":
        return {"prompt": PROMPT, "max_length": prompt_tokens + NEW_TOKENS}
    return {"model": str(model), "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 1.0}


async def load(
    server: Server, request: dict[str, object], clients: int, rounds: int
) -> list[float]:
    """Send ``clients`` × ``rounds`` requests, ``clients`` at a time; the seconds each took."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    took: list[float] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:

        async def ask() -> None:
            for _ in range(rounds):
                began = time.perf_counter()
                answer = await client.post(server.path, json=request)
                answer.raise_for_status()
                took.append(time.perf_counter() - began)

        await asyncio.gather(*(ask() for _ in range(clients)))
    return took


def measure(server: Server, model: Path, prompt_tokens: int, clients: int, pid: int) -> Result:
    request = body(server, model, prompt_tokens)
    asyncio.run(load(server, request, min(clients, 4), 1))  # warm-up
    cpu, began = cpu_seconds(pid), time.perf_counter()
    took = asyncio.run(load(server, request, clients, server.rounds))
    seconds, cpu = time.perf_counter() - began, cpu_seconds(pid) - cpu
    tokens = len(took) * NEW_TOKENS
    return Result(tokens / seconds, statistics.median(took), 1000 * cpu / tokens, peak_mib(pid))


def latencies(
    server: Server, model: Path, prompt_tokens: int, clients: int
) -> tuple[float, tuple[float, float]]:
    """Milliseconds to the first piece of a stream, the median; and from piece to piece, the median
    and the 99th percentile. Every client reads one stream, all at the same time."""
    request = body(server, model, prompt_tokens)
    streams = asyncio.run(read_streams(server, request, clients))
    first = statistics.median(times[1] - times[0] for times in streams)
    gaps = sorted(b - a for times in streams for a, b in pairwise(times[1:]))
    return 1e3 * first, (1e3 * gaps[len(gaps) // 2], 1e3 * gaps[len(gaps) * 99 // 100])


async def read_streams(
    server: Server, request: dict[str, object], clients: int
) -> list[list[float]]:
    """For each stream, when it was asked for and when its pieces came."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:

        async def read() -> list[float]:
            times = [time.perf_counter()]
            async with client.stream("POST", f"{server.path}/stream", json=request) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line == "event: token":
                        times.append(time.perf_counter())
            return times

        return await asyncio.gather(*(read() for _ in range(clients)))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server it runs ends too
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default="1,8,32,64")
    parser.add_argument("--servers", default="naive,transformers,unstored,ours")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = write_gpt2(work / "gpt2-random")
        from tokenizers import Tokenizer

        tokens = len(Tokenizer.from_file(str(model / "tokenizer.json")).encode(PROMPT).ids)
        known = servers(model, args.dtype)
        print(f"{args.dtype}, prompt {tokens} tokens, {NEW_TOKENS} new tokens a request")
        print("clients  server         tokens/s   of ours   median s   CPU s/1k   peak MiB")
        for clients in map(int, args.clients.split(",")):
            turns: list[dict[str, Result]] = []
            with contextlib.ExitStack() as stack:
                pids: dict[str, int] = {}
                for _, name in itertools.product(range(args.turns or 1), args.servers.split(",")):
                    if name not in pids:
                        if not args.turns:
                            stack.close()
                        up = running(known[name], model, args.dtype, work)
                        pids[name] = stack.enter_context(up)
                    result = measure(known[name], model, tokens, clients, pids[name])
                    if not turns or name in turns[-1]:
                        turns.append({})
                    turns[-1][name] = result
            show(clients, turns)


def show(clients: int, turns: list[dict[str, Result]]) -> None:
    for name in turns[0]:
        results = [turn[name] for turn in turns]
        speeds = [result.tokens_per_second for result in results]
        ratios = [
            speed / turn.get("ours", turn[name]).tokens_per_second
            for speed, turn in zip(speeds, turns, strict=True)
        ]
        figures = [
            statistics.median(getattr(result, column) for result in results)
            for column in ("median_seconds", "cpu_seconds", "peak_mib")
        ]
        print(
            f"{clients:7}  {name:13}{statistics.median(speeds):10.1f}"
            f"{statistics.median(ratios):10.3f}"
            f"{figures[0]:11.2f}{figures[1]:11.2f}{figures[2]:11.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
