"""Ask the engine for 10,000 texts, cancel many at random, and count what is left behind.

    python -m benchmarks.leak_test --requests 10000

Prompts of 1 to 300 tokens of the bundled model, of which many begin alike, so that the prefix
store works and is full; a tenth is never started and half is cancelled at a random moment. The
first half is the measure for the second: by then what grows to its working size has grown. Exits
with 1 if anything is left, or if memory has grown by more than 1 % and 8 MiB.
"""

import argparse
import ctypes
import gc
import random
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.engine import Engine, Generation
from engine.loading import BUNDLED_MODEL, load_model
from engine.sampling import SamplingParams

CLIENTS, PARTS = 16, 4
PREFIX_BYTES = 16 * 1024 * 1024
STORY = "once upon a time the king had three daughters and an old wolf in his wood"


@dataclass
class Left:
    """What the engine holds while it has nothing to do."""

    generations: int
    slots: int
    running: int
    waiting: int
    promised_tokens: int
    cache_rows: int
    threads: int
    memory_mib: float


def left(engine: Engine) -> Left:
    runner: Any = engine.runner
    return Left(
        generations=sum(type(thing) is Generation for thing in gc.get_objects()),
        slots=engine.used_slots,
        running=engine.running,
        waiting=engine.waiting,
        promised_tokens=engine.scheduler.promised_tokens,
        cache_rows=sum(len(arena.sequences) for arena in runner.cache.arenas),
        threads=threading.active_count(),
        memory_mib=memory_mib(),
    )


def memory_mib() -> float:
    """Resident memory, less what the allocator has free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if "VmRSS" in line).split()[1]) / 1024


def prompts(engine: Engine) -> list[list[int]]:
    chance = random.Random(0)
    stories = [" ".join(chance.choices(STORY.split(), k=400)) for _ in range(40)]
    ids = [engine.loaded.encode(story) for story in stories]
    return [chance.choice(ids)[: chance.randint(1, 300)] for _ in range(400)]


def client(engine: Engine, asked: list[list[int]], requests: int, seed: int) -> None:
    chance = random.Random(seed)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"stop": ("the",)}, {"top_k": 0}]
    for _ in range(requests):
        params = SamplingParams(
            chance.randint(1, 24), seed=chance.randrange(99), **chance.choice(kinds)
        )
        with engine.admit(chance.choice(asked), params) as generation:
            if chance.random() < 0.1:
                continue
            generation.start()
            if chance.random() < 0.5:
                time.sleep(chance.random() / 20)
                generation.cancel()
            generation.result(120)


def crowd(engine: Engine, asked: list[list[int]], requests: int, seed: int) -> None:
    counts = [requests // CLIENTS + (i < requests % CLIENTS) for i in range(CLIENTS)]
    threads = [
        threading.Thread(target=client, args=(engine, asked, count, CLIENTS * seed + i))
        for i, count in enumerate(counts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.admit([1], SamplingParams(1, seed=0)) as last:  # what ended before is freed now
        last.start()
        last.result(60)
    deadline = time.monotonic() + 10
    while engine.used_slots and time.monotonic() < deadline:
        time.sleep(0.01)


def leaks(before: Left, after: Left) -> list[str]:
    grown = [
        name
        for name, value in asdict(after).items()
        if name != "memory_mib" and value > asdict(before)[name]
    ]
    if after.memory_mib > before.memory_mib * 1.01 + 8:
        grown.append("memory_mib")
    return grown


def run(requests: int) -> list[str]:
    """Names of what was left behind."""
    engine = Engine(load_model(str(BUNDLED_MODEL), "auto", "cpu"), prefix_bytes=PREFIX_BYTES)
    asked = prompts(engine)
    idle = left(engine)
    print("at first     ", idle, flush=True)
    seen = []
    for part in range(PARTS):
        crowd(engine, asked, requests // PARTS, part)
        seen.append(left(engine))
        print(f"{requests // PARTS * (part + 1):5} requests", seen[-1], flush=True)
    print(f"{engine.reused_tokens} prompt tokens were reused")
    found = leaks(replace(idle, memory_mib=seen[PARTS // 2 - 1].memory_mib), seen[-1])
    engine.close(10)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    found = run(parser.parse_args().requests)
    print("left behind:", ", ".join(found) or "nothing")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
