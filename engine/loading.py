"""Find a model and load it: a folder or a hub id in, a ``LoadedModel`` out.

Everything is resolved to a local folder first, and only files in that folder are read: weights
from safetensors alone, no code from the hub, ever.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.pipelines import pipeline
from transformers.pipelines.text_generation import TextGenerationPipeline
from transformers.utils import logging as transformers_logging

from engine.detokenizer import UNFINISHED
from engine.naming import DEFAULT_MODEL, called, folder_of, is_path
from engine.sampling import SamplingDefaults

log = logging.getLogger(__name__)

BUNDLED_MODEL = Path(__file__).parent.parent / "weights" / "tiny-gpt2"
WEIGHTS = "model.safetensors"
HUB_PATIENCE_SECONDS = 4.0
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
UNBOUNDED_CONTEXT = 2048  # for an architecture that names no limit of its own


class ModelUnavailableError(Exception):
    """A model that cannot be had or loaded; the message names it and says what to do."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies and what to call it: the hub id, or the folder's name."""

    name: str
    folder: Path
    substitute: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and what a record must keep to run it again."""

    name: str
    pipeline: TextGenerationPipeline
    fingerprint: str  # of weights, configuration and tokenizer
    dtype: str
    device: str
    context_size: int  # tokens of prompt and continuation together
    end_ids: frozenset[int]
    defaults: SamplingDefaults
    substitute: bool  # the bundled model in place of one that could not be had

    @property
    def model(self) -> Any:
        return self.pipeline.model

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, as the pipeline tokenizes a prompt."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def encode_thread(
        self, turns: Sequence[tuple[str, str]], prompt: str
    ) -> tuple[list[int], tuple[str, ...]]:
        """Token ids of a conversation up to the reply to ``prompt``, and where the reply stops.

        The tokenizer's chat template where it has one; else ``User: …`` and ``Assistant: …``, a
        line each.
        """
        if self.tokenizer.chat_template:
            return self.encode_chat(turns, prompt), ()
        lines = [f"User: {user}\nAssistant:{spaced(answer)}\n" for user, answer in turns]
        text = "".join([*lines, f"User: {prompt}\nAssistant:"])
        return self.encode(text), ("\nUser:",)

    def encode_chat(self, turns: Sequence[tuple[str, str]], prompt: str) -> list[int]:
        chat = []
        for user, answer in [*turns, (prompt, None)]:
            chat.append({"role": "user", "content": user})
            if answer is not None:
                chat.append({"role": "assistant", "content": answer})
        encoded = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out.

        An unfinished character gives U+FFFD, and so does NUL: vocabularies of bytes have a token
        for it, and PostgreSQL takes no text that holds one.
        """
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).replace("\0", UNFINISHED)


def spaced(answer: str) -> str:
    """An answer after ``Assistant:``, as the model writes it: with a space before it."""
    return answer if answer.startswith(" ") else f" {answer}"


def load_model(name: str | None, dtype: str, device: str) -> LoadedModel:
    """Load what ``find_model`` finds.

    ``dtype`` is ``auto``, ``float32`` or ``bfloat16``; ``device`` is ``auto``, ``cpu`` or ``cuda``.
    Raises ModelUnavailableError.
    """
    source = find_model(name)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    try:
        loaded = load_pipeline(source.folder, chosen_dtype, chosen_device)
    except Exception as error:
        log.debug("model did not load", exc_info=True)
        raise ModelUnavailableError(
            f"MODEL={source.name} did not load ({type(error).__name__}): it takes a causal language"
            " model of Transformers with safetensors weights and a tokenizer"
        ) from error
    return LoadedModel(
        name=source.name,
        pipeline=loaded,
        fingerprint=fingerprint(source.folder),
        dtype=str(chosen_dtype).removeprefix("torch."),
        device=chosen_device,
        context_size=context_size(loaded.model.config),
        end_ids=end_ids(loaded),
        defaults=sampling_defaults(loaded),
        substitute=source.substitute,
    )


def find_model(name: str | None) -> ModelSource:
    """A set ``name`` is found or refused; unset, it is GPT-2 or else the bundled model."""
    if name is not None:
        return ModelSource(*find_named_model(name))
    try:
        return ModelSource(DEFAULT_MODEL, hub_folder(DEFAULT_MODEL))
    except ModelUnavailableError as error:
        log.warning("%s; running on the small bundled model %s instead", error, BUNDLED_MODEL.name)
        return ModelSource(BUNDLED_MODEL.name, BUNDLED_MODEL, substitute=True)


def find_named_model(name: str) -> tuple[str, Path]:
    folder = folder_of(name)
    if folder.is_dir():
        if not has_weights(folder):
            raise ModelUnavailableError(
                f"MODEL={name}: the folder holds no safetensors weights, or not all"
            )
        return called(name), folder
    if is_path(name):
        raise ModelUnavailableError(f"MODEL={name}: there is no such folder")
    return name, hub_folder(name)


def hub_folder(hub_id: str) -> Path:
    """The local copy of a hub model, downloaded if need be. Raises ModelUnavailableError."""
    cached = cached_folder(hub_id)
    if cached is not None:
        return cached
    if not hub_answers(hub_id):
        raise ModelUnavailableError(
            f"MODEL={hub_id} is not on this machine, and the model hub did not offer it within"
            f" {HUB_PATIENCE_SECONDS:.0f} seconds"
        )
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:
        raise ModelUnavailableError(
            f"MODEL={hub_id} could not be downloaded ({type(error).__name__})"
        ) from error
    if not has_weights(folder):
        raise ModelUnavailableError(f"MODEL={hub_id}: the hub has no safetensors weights for it")
    return folder


def cached_folder(hub_id: str) -> Path | None:
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=HUB_FILES, local_files_only=True
            )
        )
    except Exception:
        return None
    return folder if has_weights(folder) else None


def hub_answers(hub_id: str) -> bool:
    """Whether the hub offers the model, asked in a thread: a name lookup obeys no time-out."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            huggingface_hub.HfApi().model_info(hub_id, timeout=HUB_PATIENCE_SECONDS)
            answers.append(True)
        except Exception:
            log.debug("the model hub did not answer", exc_info=True)

    asking = threading.Thread(target=ask, name="ask-hub", daemon=True)
    asking.start()
    asking.join(HUB_PATIENCE_SECONDS)
    return bool(answers)


def has_weights(folder: Path) -> bool:
    """Whether all of them are there: a download that was killed half way leaves some."""
    names = {"config.json", *weight_files(folder)}
    return all((folder / name).is_file() for name in names)


def weight_files(folder: Path) -> set[str]:
    """What Transformers reads: one file, or those that an index names."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return {WEIGHTS}
    try:
        return {*json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError):  # written half
        return {WEIGHTS}


def choose_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelUnavailableError("DEVICE=cuda: PyTorch sees no CUDA device here")
    return device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it natively: on processors, matrix units
    (AMX) or AVX-512 dot products (docs/decisions/0014-bfloat16-by-itself.md)."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def load_pipeline(folder: Path, dtype: torch.dtype, device: str) -> TextGenerationPipeline:
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    loaded = pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)
    assert isinstance(loaded, TextGenerationPipeline)
    return loaded


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and bytes of everything the model was loaded from, 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".safetensors", ".json", ".txt", ".model", ".jinja"}:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def context_size(config: Any) -> int:
    """The most tokens of prompt and text that a model was made for."""
    text = config.get_text_config()
    own_name = getattr(text, "max_seq_len", UNBOUNDED_CONTEXT)  # MPT's
    size = int(getattr(text, "max_position_embeddings", own_name))
    return size if size > 0 else UNBOUNDED_CONTEXT  # XLNet's is -1


def end_ids(loaded: TextGenerationPipeline) -> frozenset[int]:
    declared = loaded.model.generation_config.eos_token_id
    if declared is None:
        declared = loaded.tokenizer.eos_token_id
    if declared is None:
        return frozenset()
    return frozenset(declared if isinstance(declared, list) else [declared])


def sampling_defaults(loaded: TextGenerationPipeline) -> SamplingDefaults:
    """The model's settings, then the pipeline's, then ``generate``'s: the first that is set."""
    own = loaded.model.generation_config
    pipelines = TextGenerationPipeline._default_generation_config
    general = own._get_default_generation_params()

    def value(key: str) -> Any:
        for config in (own, pipelines):
            if (found := getattr(config, key, None)) is not None:
                return found
        return general[key]

    return SamplingDefaults(
        temperature=float(value("temperature")) if value("do_sample") else 0.0,
        top_k=int(value("top_k")),
        top_p=float(value("top_p")),
        repetition_penalty=float(value("repetition_penalty")),
    )
