"""What is chosen when nothing is said."""

import re
from pathlib import Path

import pytest
import torch

from engine.loading import choose_dtype

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="the kernel does not say what the processor can")
def test_auto_is_bfloat16_exactly_where_the_processor_multiplies_it() -> None:
    flags = set(re.findall(r"\w+", CPUINFO.read_text()))
    native = bool(flags & {"amx_bf16", "avx512_bf16"})
    assert choose_dtype("auto", "cpu") is (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_used(name: str) -> None:
    assert choose_dtype(name, "cpu") is getattr(torch, name)
