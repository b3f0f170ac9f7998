"""What is chosen when nothing is said, what a model is called, and which folders hold one."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig, XLNetConfig

from engine import loading
from engine.loading import (
    UNBOUNDED_CONTEXT,
    ModelUnavailableError,
    choose_dtype,
    context_size,
    find_model,
    load_model,
)
from engine.naming import called
from tests.engine.conftest import TINY

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="the kernel does not say what the processor can")
def test_auto_is_bfloat16_exactly_where_the_processor_multiplies_it() -> None:
    flags = set(re.findall(r"\w+", CPUINFO.read_text()))
    native = bool(flags & {"amx_bf16", "avx512_bf16"})
    assert choose_dtype("auto", "cpu") is (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_used(name: str) -> None:
    assert choose_dtype(name, "cpu") is getattr(torch, name)


@pytest.mark.parametrize("name", [TINY, f"{TINY}/", f"{TINY}/../tiny-gpt2", "weights/tiny-gpt2"])
def test_a_folder_is_called_by_its_name_before_and_after_it_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(TINY).parents[1])
    assert called(name) == find_model(name).name == "tiny-gpt2"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, "gpt2"),
        ("gpt2", "gpt2"),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"),
        ("/no/such/folder", "folder"),
        ("~nobody-of-that-name/models/own", "own"),
    ],
)
def test_a_model_that_is_not_here_is_called_by_its_id_or_by_no_path(
    name: str | None, expected: str
) -> None:
    assert called(name) == expected


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def sharded(folder: Path) -> Path:
    """The bundled model, its weights in two files."""
    folder.mkdir(parents=True)
    for path in Path(TINY).iterdir():
        if path.suffix == ".json":
            shutil.copy(path, folder)
    weights = load_file(Path(TINY) / "model.safetensors")
    shard_of = {name: SHARDS[place % 2] for place, name in enumerate(weights)}
    for shard in SHARDS:
        part = {name: weight for name, weight in weights.items() if shard_of[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_model_in_several_files_is_loaded(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "whole")
    assert load_model(str(folder), "float32", "cpu").name == "whole"


@pytest.mark.parametrize(
    "lost",
    [SHARDS[1], "config.json", "model.safetensors.index.json", "all but a part of the index"],
)
def test_a_folder_with_some_of_a_models_files_is_refused(tmp_path: Path, lost: str) -> None:
    folder = sharded(tmp_path / "part")
    if (folder / lost).exists():
        (folder / lost).unlink()
    else:
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a')
    with pytest.raises(ModelUnavailableError, match="not all"):
        find_model(str(folder))


def test_a_download_that_ended_half_way_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    repository = tmp_path / "models--some--sharded"
    folder = sharded(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(loading, "hub_answers", lambda name: asked.append(name))
    assert find_model("some/sharded").folder == folder
    assert asked == []
    (folder / SHARDS[1]).unlink()
    with pytest.raises(ModelUnavailableError):
        find_model("some/sharded")
    assert asked == ["some/sharded"]


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (GPT2Config(n_positions=7), 7),
        (LlamaConfig(max_position_embeddings=8), 8),
        (MptConfig(max_seq_len=9), 9),
        (XLNetConfig(), UNBOUNDED_CONTEXT),
        (BloomConfig(), UNBOUNDED_CONTEXT),
    ],
)
def test_a_models_context_is_what_its_configuration_names(config: Any, tokens: int) -> None:
    assert context_size(config) == tokens
