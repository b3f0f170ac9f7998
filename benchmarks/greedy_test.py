"""Compare greedy texts, made 32 at a time, with Hugging Face's `generate`, token for token.

    python -m benchmarks.greedy_test --prompts 200

Prompts of 1 to 900 words on the bundled model in float32. Exits with 1 if any text differs.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from engine.engine import Engine
from engine.loading import BUNDLED_MODEL, load_model
from tests.engine.conftest import greedy, mixed_prompts
from tests.engine.test_engine import of_transformers, run

CROWD, NEW_TOKENS, LONG = 32, 40, 20  # every so many prompts is a long one


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    count = parser.parse_args().prompts
    long = count // LONG
    prompts = mixed_prompts(count - long, seed=1) + mixed_prompts(long, seed=2, longest=900)
    loaded = load_model(str(BUNDLED_MODEL), "float32", "cpu")
    engine = Engine(loaded)
    penalty = loaded.defaults.repetition_penalty

    def text_of(prompt: str) -> list[int]:
        return list(run(engine, prompt, greedy(NEW_TOKENS, penalty)).result(120).token_ids)

    with ThreadPoolExecutor(CROWD) as clients:
        found = list(clients.map(text_of, prompts))
    engine.close(10)
    differing = [
        prompt
        for prompt, ids in zip(prompts, found, strict=True)
        if ids != of_transformers(loaded, prompt, NEW_TOKENS, penalty)
    ]
    print(
        f"{count} prompts, {len(set(map(tuple, found)))} different texts: {len(differing)} differ"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
