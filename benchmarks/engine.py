"""The engine against what people install instead, in one process and one run.

GPT-2's real size (124M parameters) or Llama's architecture in that size (``--architecture``),
random weights, short prompts, every request a fixed number of new tokens, sampled. Compared with
the matrix products that a step cannot do without, with Hugging Face ``generate`` on a static
batch, and with a pipeline call a request in four threads.

    python -m benchmarks.engine --dtype bfloat16 --clients 1 32
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.pipelines import pipeline

from engine.engine import Engine, StepOutput
from engine.gpt2_runner import Block, GPT2Runner
from engine.linear import Linear
from engine.loading import LoadedModel
from engine.row_model import product_of
from engine.sampling import SamplingDefaults, SamplingParams

TOKENIZER = Path(__file__).parents[1] / "weights" / "tiny-gpt2"
PROMPT = "Once upon a time there was a king who had three daughters"
THREADS_OF_THE_GUIDE = 4
REQUESTS_OF_THE_GUIDE = 8
SECONDS_A_LINE = 2.0


@dataclass
class EngineLine:
    """``tokens_a_second``, and milliseconds: a steady step, to the first token, between tokens."""

    tokens_a_second: float
    step: float
    first_token: float
    gap_50: float
    gap_99: float


def config_of(architecture: str, layers: int) -> GPT2Config | LlamaConfig:
    if architecture == "gpt2":
        return GPT2Config(n_layer=layers)
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=12,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=None,
    )


def load(dtype: str, layers: int, architecture: str) -> LoadedModel:
    torch.manual_seed(0)
    config = config_of(architecture, layers)
    model = AutoModelForCausalLM.from_config(config)
    model = model.to(getattr(torch, dtype)).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    return LoadedModel(
        name=f"{architecture} with random weights",
        pipeline=pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu"),
        fingerprint="",
        dtype=dtype,
        device="cpu",
        context_size=config.max_position_embeddings,
        end_ids=frozenset(),
        defaults=SamplingDefaults(1.0, 50, 1.0, 1.0),
        substitute=False,
    )


def apart(run: Callable[..., Any], *args: Any) -> Any:
    """Run it in a thread that then ends. OpenMP keeps threads for each thread that computes, and
    those left behind would slow down the engine's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run, *args).result()


class Steps:
    """When each generation got its tokens."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, int]] = []
        self.times: dict[int, list[float]] = {}

    def __call__(self, outputs: list[StepOutput]) -> None:
        now = time.perf_counter()
        self.rows.append((now, len(outputs)))
        for output in outputs:
            self.times.setdefault(id(output.generation), []).append(now)

    def steady_step(self) -> float:
        """Milliseconds, the median over steps in which as many rows decoded as ever did."""
        most = max(rows for _, rows in self.rows)
        pairs = pairwise(self.rows)
        return 1e3 * statistics.median(
            b - a for (a, n), (b, m) in pairs if n == m == most and b - a < 5
        )

    def gaps(self) -> list[float]:
        return sorted(1e3 * (b - a) for times in self.times.values() for a, b in pairwise(times))


def run_engine(engine: Engine, clients: int, new: int) -> EngineLine:
    prompt = engine.loaded.encode(PROMPT)

    def round_of(clients: int, seed: int) -> None:
        params = (SamplingParams(new, seed=seed + i) for i in range(clients))
        generations = [engine.admit(prompt, p) for p in params]
        for generation in generations:
            began[id(generation)] = time.perf_counter()
            generation.start()
        kept.extend(generations)
        for generation in generations:
            generation.result()

    began: dict[int, float] = {}
    kept: list[Any] = []  # ids are only unique while their objects live
    round_of(min(clients, engine.scheduler.max_running), 0)
    steps = Steps()
    end = engine.subscribe(steps)
    rounds, start = 0, time.perf_counter()
    while rounds < 1 or time.perf_counter() - start < SECONDS_A_LINE:
        round_of(clients, 1000 * (1 + rounds))
        rounds += 1
    seconds = time.perf_counter() - start
    end()
    gaps = steps.gaps()
    return EngineLine(
        tokens_a_second=rounds * clients * new / seconds,
        step=steps.steady_step(),
        first_token=1e3 * statistics.median(t[0] - began[i] for i, t in steps.times.items()),
        gap_50=gaps[len(gaps) // 2],
        gap_99=gaps[len(gaps) * 99 // 100],
    )


def products_of(model: Any) -> list[Linear]:
    if GPT2Runner.takes(model):
        blocks = [Block(block) for block in model.transformer.h]
        return [
            *(p for block in blocks for p in block.products),
            Linear(model.lm_head.weight, None),
        ]
    return [product_of(module) for module in model.modules() if type(module) is torch.nn.Linear]


def floors_of(loaded: LoadedModel, counts: list[int]) -> dict[int, float]:
    """Milliseconds of a step's matrix products alone, packed as the engine packs them.

    Measured before there is an engine: its thread would be in the way (see ``apart``).
    """
    products = products_of(loaded.model)
    dtype = loaded.model.dtype
    floors = {}
    with torch.inference_mode():
        for rows in counts:
            inputs = [torch.randn(rows, p.in_features).to(dtype) for p in products]
            times = []
            for _ in range(14):
                start = time.perf_counter()
                for product, x in zip(products, inputs, strict=True):
                    product(x)
                times.append(time.perf_counter() - start)
            floors[rows] = 1e3 * statistics.median(times[2:])
    return floors


def run_generate(loaded: LoadedModel, clients: int, new: int) -> float:
    """Tokens a second of Transformers' own ``generate`` on one static batch."""
    ids = torch.tensor([loaded.encode(PROMPT)] * clients)

    def batch(tokens: int) -> None:
        loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=True,
            top_k=50,
            pad_token_id=0,
        )

    batch(2)
    rounds, start = 0, time.perf_counter()
    while rounds < 1 or time.perf_counter() - start < SECONDS_A_LINE:
        batch(new)
        rounds += 1
    return rounds * clients * new / (time.perf_counter() - start)


def run_guide(loaded: LoadedModel, new: int) -> float:
    """Tokens a second of a pipeline call a request in a pool of threads, as many guides have it."""

    def request(_: int) -> None:
        loaded.pipeline(
            PROMPT, min_new_tokens=new, max_new_tokens=new, do_sample=True, pad_token_id=0
        )

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS_OF_THE_GUIDE) as pool:
        list(pool.map(request, range(REQUESTS_OF_THE_GUIDE)))
    return REQUESTS_OF_THE_GUIDE * new / (time.perf_counter() - start)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--architecture", default="gpt2", choices=["gpt2", "llama"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32, 64, 256])
    parser.add_argument("--new", type=int, default=44, help="new tokens a request")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument(
        "--peers", nargs="*", default=["generate", "guide"], choices=["generate", "guide"]
    )
    parser.add_argument(
        "--peers-up-to", type=int, default=64, help="clients beyond which no peer is measured"
    )
    return parser.parse_args()


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    given = options()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.new} new tokens")
    print(
        "| dtype | clients | tokens/s | step ms | products ms | step / products | first token ms"
        " | between tokens p50, p99 ms | generate tokens/s | engine / generate"
        " | pipeline in threads tokens/s | engine / that |"
    )
    print("|" + "---|" * 12)
    for dtype in given.dtype:
        loaded = apart(load, dtype, given.layers, given.architecture)
        peer = apart(load, dtype, given.layers, given.architecture)  # the engine packs its own
        guide = apart(run_guide, peer, given.new) if "guide" in given.peers else None
        steps = {clients: min(clients, given.max_running) for clients in given.clients}
        floors = apart(floors_of, peer, sorted(set(steps.values())))
        engine = Engine(loaded, max_waiting=1024, max_running=given.max_running)
        for clients in given.clients:
            line = run_engine(engine, clients, given.new)
            asked = "generate" in given.peers and clients <= given.peers_up_to
            generate = apart(run_generate, peer, clients, given.new) if asked else None
            print(row(dtype, clients, line, floors[steps[clients]], generate, guide), flush=True)
        engine.close(10)


def row(
    dtype: str,
    clients: int,
    line: EngineLine,
    floor: float,
    generate: float | None,
    guide: float | None,
) -> str:
    def against(peer: float | None) -> list[str]:
        return ["", ""] if peer is None else [f"{peer:.0f}", f"{line.tokens_a_second / peer:.2f}"]

    cells = [
        dtype,
        str(clients),
        f"{line.tokens_a_second:.0f}",
        f"{line.step:.1f}",
        f"{floor:.1f}",
        f"{line.step / floor:.2f}",
        f"{line.first_token:.0f}",
        f"{line.gap_50:.1f}, {line.gap_99:.1f}",
        *against(generate),
        *against(guide),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
