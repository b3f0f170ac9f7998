"""Tokens a second of the engine alone on the machine, and beside processes that never rest.

    python -m benchmarks.contended
    GOMP_SPINCOUNT=300000 python -m benchmarks.contended      as OpenMP would wait by itself

GPT-2's 124M shapes with random weights in float32, eight texts at once.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shapes import write_gpt2
from engine.engine import Engine
from engine.loading import load_model
from engine.sampling import SamplingParams

TEXTS, TOKENS, SECONDS = 8, 12, 8.0


def batch(engine: Engine) -> int:
    """Tokens of some texts at once."""
    prompt = engine.loaded.encode("Once upon a time")
    running = [engine.admit(prompt, SamplingParams(TOKENS, seed=i)) for i in range(TEXTS)]
    for generation in running:
        generation.start()
    return sum(len(generation.result(600).token_ids) for generation in running)


def tokens_a_second(engine: Engine, busy: int) -> float:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        batch(engine)
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            tokens += batch(engine)
        return tokens / (time.perf_counter() - start)
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(load_model(str(write_gpt2(Path(folder) / "gpt2")), "float32", "cpu"))
        for busy in arguments.busy:
            print(f"{busy} busy processes: {tokens_a_second(engine, busy):.0f} tokens a second")
        engine.close(10)


if __name__ == "__main__":
    main()
