"""Run stored records again over HTTP while others run, and count those that come out otherwise.

    python -m benchmarks.replay_test --records 200

Records of all kinds (greedy, sampled, filtered, stopped, messages of conversations) are made by
16 clients at once, and then run again in another order by 8 while 16 others ask for texts of their
own, once in float32 and once in bfloat16. Exits with 1 unless every record is identical.
"""

import argparse
import random
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.service import serving

MAKERS, REPLAYERS, OTHERS = 16, 8, 16
STORY = "once upon a time the king had three daughters and an old wolf in his wood"
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.9},
    {"temperature": 1, "top_k": 0},
    {"stop": [" the", "."]},
]


def body(chance: random.Random) -> dict[str, Any]:
    """Up to some 90 tokens of prompt: more than one chunk of the scheduler's grid."""
    prompt = " ".join(chance.choices(STORY.split(), k=chance.randint(1, 90)))[:500]
    return {"prompt": prompt, "max_length": chance.randint(130, 200)} | chance.choice(KINDS)


def make(http: httpx.Client, seed: int) -> int:
    """A record's id: a prompt continued, or now and then a conversation's second message."""
    chance = random.Random(seed)
    asked = body(chance)
    if chance.random() < 0.8:
        return int(answered(http.post("/generate", json=asked))["id"])
    thread = answered(http.post("/conversations", json={"title": "A talk"}))["id"]
    path = f"/conversations/{thread}/messages"
    asked["prompt_content"] = asked.pop("prompt")
    for _ in range(2):
        message = answered(http.post(path, json=asked))
    return int(message["id"])


def answered(answer: httpx.Response) -> dict[str, Any]:
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def ask_until(stopping: threading.Event, http: httpx.Client, seed: int) -> None:
    chance = random.Random(seed)
    while not stopping.is_set():
        answered(http.post("/generate", json=body(chance)))


def replays(url: str, records: int) -> Counter[str]:
    """How many came out in which way."""
    limits = httpx.Limits(max_connections=64)
    stopping = threading.Event()
    with httpx.Client(base_url=url, timeout=300, limits=limits) as http:
        with ThreadPoolExecutor(MAKERS) as pool:
            made = list(pool.map(lambda seed: make(http, seed), range(records)))
        random.Random(0).shuffle(made)
        with ThreadPoolExecutor(OTHERS) as others, ThreadPoolExecutor(REPLAYERS) as pool:
            asking = [others.submit(ask_until, stopping, http, -1 - i) for i in range(OTHERS)]
            try:
                results = pool.map(lambda id: answered(http.post(f"/history/{id}/replay")), made)
                counts = Counter(result["result"] for result in results)
            finally:
                stopping.set()
            for future in asking:
                future.result()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    wrong = 0
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as folder:
            environment = {"DATABASE_URL": f"sqlite:///{Path(folder) / 'records.db'}"}
            environment |= {"DTYPE": dtype, "LOG_LEVEL": "WARNING"}
            with serving(Path(folder) / "server.log", **environment) as server:
                counts = replays(server.url, args.records)
        print(f"{dtype}: {counts['identical']} of {args.records} identical; {dict(counts)}")
        wrong += args.records - counts["identical"]
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
