"""How much faster is an answer from the store than the same answer generated?

    python -m benchmarks.cached

One client on a server with the bundled model, 50 new tokens, each answer committed; in every turn
one prompt is generated and then asked for again, so both are measured in one run. Prints the
medians and their ratio.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from tests.service import serving

BODY = {"temperature": 1.5, "use_cache": True}  # so hot that hardly a text ends by itself


def timed(client: httpx.Client, prompt: str) -> tuple[float, bool, int]:
    began = time.perf_counter()
    record = client.post("/generate", json=BODY | {"prompt": prompt}).raise_for_status().json()
    return time.perf_counter() - began, record["cached"], record["completion_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=60)
    arguments = parser.parse_args()
    generated, cached = [], []
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/records.db"
        with (
            serving(Path(folder) / "log", DATABASE_URL=url) as server,
            httpx.Client(base_url=server.url, timeout=60) as client,
        ):
            for turn in range(arguments.turns):
                prompt = f"Once upon a time there were {turn} kings"
                first, hit, tokens = timed(client, prompt)
                again, hit_again, _ = timed(client, prompt)
                assert (hit, hit_again) == (False, True)
                if tokens == 50:
                    generated.append(first)
                    cached.append(again)
    slow, fast = statistics.median(generated), statistics.median(cached)
    print(f"{len(generated)} pairs of 50 tokens")
    print(f"generated {slow * 1000:7.2f} ms\ncached    {fast * 1000:7.2f} ms")
    print(f"ratio     {slow / fast:7.1f}")


if __name__ == "__main__":
    main()
