"""What a turn of a conversation costs, with and without the keys and values of the last one.

    python -m benchmarks.conversation

GPT-2's 124M shapes with random weights; each turn adds a message to the thread and gets a reply.
The two engines take turns, so that both meet the same machine.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

from benchmarks.shapes import write_gpt2
from engine.engine import Engine
from engine.loading import load_model
from engine.sampling import SamplingParams

TURNS, MESSAGE, REPLY = 10, 60, 20


def turn(engine: Engine, thread: list[int], seed: int) -> tuple[float, list[int]]:
    """Seconds to the first token, and the reply."""
    with engine.admit(thread, SamplingParams(REPLY, seed=seed)) as generation:
        began = time.perf_counter()
        generation.start()
        next(generation.pieces())
        first = time.perf_counter() - began
        return first, list(generation.result().token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model(str(write_gpt2(Path(folder) / "gpt2-random")), args.dtype, "cpu")
    engines = {"computed anew": Engine(loaded, prefix_bytes=0), "reused": Engine(loaded)}
    for engine in engines.values():
        turn(engine, list(range(1, 40)), 0)  # warm-up
    rng = random.Random(1)
    thread: list[int] = []
    print(f"{args.dtype}: milliseconds to the first token")
    print("turn  prompt  computed anew    reused  ratio")
    for number in range(1, TURNS + 1):
        thread += [rng.randrange(1, 50_000) for _ in range(MESSAGE)]
        took, replies = [], []
        for engine in engines.values():
            first, reply = turn(engine, thread, number)
            took.append(first * 1000)
            replies.append(reply)
        assert replies[0] == replies[1], "reuse changed the text"
        print(f"{number:4}{len(thread):8}{took[0]:15.1f}{took[1]:10.1f}{took[1] / took[0]:7.2f}")
        thread += replies[0]
    for engine in engines.values():
        engine.close(10)


if __name__ == "__main__":
    main()
