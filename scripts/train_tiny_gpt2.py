"""Train the bundled model: a small GPT-2 on public-domain children's stories.

    python scripts/train_tiny_gpt2.py CORPUS            train, or go on where a run stopped
    python scripts/train_tiny_gpt2.py CORPUS --export   write the best checkpoint as a model folder

CORPUS is a folder with ``train.txt.xz`` and ``valid.txt.xz``: plain text in which a line
``<|endoftext|>`` follows each document. A run is a pure function of its arguments: batch number N
is drawn from (seed, N) alone, so a run that was interrupted and resumed sees the same data.

The recipe: byte-level BPE; GPT-2 with learned positions and no dropout; Muon (Jordan et al. 2024,
``torch.optim.Muon``) for the weight matrices and AdamW for the rest; a constant learning rate that
falls linearly to zero at the end (Hägele et al. 2024, https://arxiv.org/abs/2405.18392), so that
``--steps`` may still be changed on resuming; short windows first and the model's whole context in
the last part (Li et al. 2022, https://arxiv.org/abs/2108.06084), which trains every position for a
fraction of the cost.
"""

import argparse
import lzma
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import GenerationConfig, GPT2Config, PreTrainedTokenizerFast
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 1024
TOKENS_PER_STEP = 8192
TOKENS_PER_MICROBATCH = 2048  # what fits a small processor's cache runs fastest


@dataclass
class Corpus:
    train: list[str]
    valid: list[str]

    @classmethod
    def read(cls, folder: Path) -> "Corpus":
        return cls(documents(folder / "train.txt.xz"), documents(folder / "valid.txt.xz"))


def documents(path: Path) -> list[str]:
    """The documents of a corpus file, without their separators."""
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    return [document.strip() for document in text.split(END_OF_TEXT) if document.strip()]


def load_or_train_tokenizer(corpus: Corpus, vocabulary: int, work: Path) -> PreTrainedTokenizerFast:
    path = work / "tokenizer.json"
    if not path.exists():
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            corpus.train, vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False
        )
        tokenizer.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """One stream of token ids: the end-of-text token, then each text followed by it."""
    end = tokenizer.eos_token_id
    stream = [end]
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        stream.extend(ids)
        stream.append(end)
    return torch.tensor(stream)


def batch(stream: torch.Tensor, step: int, window: int, seed: int) -> torch.Tensor:
    """Step ``step``'s windows, shape (windows, window + 1): every epoch a new shuffle and phase."""
    per_step = TOKENS_PER_STEP // window
    windows = (len(stream) - 1) // window - 1
    epoch, index = divmod(step, windows // per_step)
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    phase = int(torch.randint(window, (1,), generator=rng))
    chosen = torch.randperm(windows, generator=rng)[index * per_step : (index + 1) * per_step]
    starts = chosen * window + phase
    return stream[starts[:, None] + torch.arange(window + 1)]


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")


def new_optimizers(model: GPT2LMHeadModel, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_at(step: int, steps: int, decay: float, warmup: int = 100) -> float:
    """The learning rate's factor at a step: up, flat, and down over the last ``decay`` part."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (steps * decay)))


class Trainer:
    def __init__(self, args: argparse.Namespace, corpus: Corpus) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_or_train_tokenizer(corpus, args.vocabulary, args.work)
        self.train = encode(corpus.train, self.tokenizer)
        self.valid = encode(corpus.valid, self.tokenizer)
        self.valid_bytes = sum(len(text.encode()) for text in corpus.valid)
        self.model = new_model(args, self.tokenizer).to(self.device)
        self.optimizers = new_optimizers(self.model, args.rate)
        self.loss = (
            torch.compile(self.plain_loss, dynamic=False) if args.compile else self.plain_loss
        )
        self.step, self.best, self.stale = 0, math.inf, 0
        if self.checkpoint.exists():
            self.resume()

    @property
    def checkpoint(self) -> Path:
        return Path(self.args.work) / "last.pt"

    def plain_loss(self, windows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.model.transformer(windows[:, :-1], use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def run(self) -> None:
        args = self.args
        bar = tqdm(total=args.steps, initial=self.step, unit="step", dynamic_ncols=True)
        while self.step < args.steps and self.stale < args.patience:
            loss = self.take_step()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", bits_per_byte=f"{self.best:.4f}")
            if self.step % args.evaluate_every == 0 or self.step == args.steps:
                self.evaluate_and_save()
                bar.write(f"step {self.step}: {self.last_bits:.4f} bits per byte, loss {loss:.3f}")
        bar.close()

    def take_step(self) -> float:
        args = self.args
        window = CONTEXT if self.step >= args.steps * (1 - args.long_part) else args.window
        factor = rate_at(self.step, args.steps, args.decay)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * factor
        windows = batch(self.train, self.step, window, args.seed).to(self.device)
        parts = windows.split(TOKENS_PER_MICROBATCH // window)
        total = 0.0
        for part in parts:
            loss = self.loss(part) / len(parts)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def evaluate_and_save(self) -> None:
        """Measure on the held-out text; keep the best weights and the last state."""
        long = self.step > self.args.steps * (1 - self.args.long_part)
        self.last_bits = bits_per_byte(
            self.model, self.valid, self.valid_bytes, CONTEXT if long else self.args.window
        )
        self.stale = 0 if self.last_bits < self.best else self.stale + 1
        if self.last_bits < self.best:
            self.best = self.last_bits
            save_atomically(self.model.state_dict(), Path(self.args.work) / "best.pt")
        save_atomically(
            {
                "step": self.step,
                "best": self.best,
                "stale": self.stale,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
            self.checkpoint,
        )

    def resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.step, self.best, self.stale = state["step"], state["best"], state["stale"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def save_atomically(state: object, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


@torch.no_grad()
def bits_per_byte(model: GPT2LMHeadModel, stream: torch.Tensor, n_bytes: int, window: int) -> float:
    """Bits the model needs for the whole stream, a byte of its text.

    Windows of ``window`` tokens overlap by half: a token is counted once, with at least half a
    window before it (but for the first window's). The end-of-text tokens' bits are counted, their
    bytes are not.
    """
    device, nats, counted = model.device, 0.0, 1
    for start in range(0, len(stream) - 1, window // 2):
        ids = stream[start : start + window + 1].to(device)
        new = start + len(ids) - counted
        if new <= 0:
            break
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(ids[None, :-1], use_cache=False).logits[0, -new:]
        nats += float(F.cross_entropy(logits.float(), ids[-new:], reduction="sum"))
        counted += new
    return nats / math.log(2) / n_bytes


def export(args: argparse.Namespace, corpus: Corpus) -> None:
    """Write the best weights as a Transformers model folder and measure what was written."""
    tokenizer = load_or_train_tokenizer(corpus, args.vocabulary, args.work)
    model = new_model(args, tokenizer)
    model.load_state_dict(torch.load(args.work / "best.pt", map_location="cpu", weights_only=True))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        repetition_penalty=1.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.half().save_pretrained(args.out)  # half the bytes; it is loaded as float32 or bfloat16
    tokenizer.save_pretrained(args.out)
    written = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32).eval()
    stream = encode(corpus.valid, tokenizer)
    n_bytes = sum(len(text.encode()) for text in corpus.valid)
    parameters = sum(p.numel() for p in written.parameters())
    size = (args.out / "model.safetensors").stat().st_size
    print(f"parameters: {parameters:,}; model.safetensors: {size:,} bytes")
    print(f"held-out bits per byte: {bits_per_byte(written, stream, n_bytes, CONTEXT):.4f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder with train.txt.xz and valid.txt.xz")
    parser.add_argument("--work", type=Path, default=Path("training"), help="checkpoints go here")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny-gpt2"))
    parser.add_argument("--export", action="store_true", help="write the best checkpoint to --out")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6000, help=f"of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--window", type=int, default=256, help="tokens a window, first part")
    parser.add_argument("--long-part", type=float, default=0.2, help="share of steps at 1,024")
    parser.add_argument("--decay", type=float, default=0.4, help="share of steps that decay")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps")
    parser.add_argument("--patience", type=int, default=15, help="evaluations without progress")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    random.seed(args.seed)
    corpus = Corpus.read(args.corpus)
    if args.export:
        export(args, corpus)
    else:
        Trainer(args, corpus).run()


if __name__ == "__main__":
    sys.exit(main())
