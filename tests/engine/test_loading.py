"""What is chosen when nothing is said, and what a model is called."""

import re
from pathlib import Path

import pytest
import torch

from engine.loading import choose_dtype, find_model
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
