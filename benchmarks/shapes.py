"""GPT-2's real sizes with random weights: speed does not depend on what the weights say."""

import json
from pathlib import Path

import torch
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

TINY = Path(__file__).parent.parent / "weights" / "tiny-gpt2"


def write_gpt2(folder: Path) -> Path:
    """A model folder: GPT-2 124M shapes, and the bundled tokenizer filled up to 50,257 tokens."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    end = 0  # the bundled tokenizer's end of text
    config = GPT2Config(bos_token_id=end, eos_token_id=end)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for number in range(len(vocabulary), config.vocab_size):
        vocabulary[f"w{number}"] = number  # reached by no merge: prompts are encoded as before
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text((TINY / "tokenizer_config.json").read_text())
    return folder
