"""Runs GPT-2: its blocks, with each product packed and what can be fused fused.

Rows, attention and keys and values are those of ragged.py. Knows no sampling, no text.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from engine.kv_cache import Shape
from engine.linear import Linear
from engine.ragged import Layout, Limits, RaggedRunner, Rule
from engine.scheduler import Plan

log = logging.getLogger(__name__)

GELU_TANH = {"gelu_new", "gelu_pytorch_tanh"}  # two spellings of one function


class Block:
    """The weights of one transformer layer; Transformers' Conv1D keeps them as [in, out]."""

    def __init__(self, source: Any) -> None:
        self.norm_1, self.norm_2 = source.ln_1, source.ln_2
        self.qkv = Linear(source.attn.c_attn.weight.t(), source.attn.c_attn.bias)
        self.out = Linear(source.attn.c_proj.weight.t(), source.attn.c_proj.bias)
        self.up = Linear(source.mlp.c_fc.weight.t(), source.mlp.c_fc.bias, gelu=True)
        self.down = Linear(source.mlp.c_proj.weight.t(), source.mlp.c_proj.bias)

    @property
    def products(self) -> list[Linear]:
        return [self.qkv, self.out, self.up, self.down]


class GPT2Runner(RaggedRunner):
    @staticmethod
    def takes(model: Any) -> bool:
        """Whether it is GPT-2 as this runner computes it, with none of the rarer options."""
        if not isinstance(model, GPT2LMHeadModel):
            return False
        config = model.config
        return (
            config.activation_function in GELU_TANH
            and config.scale_attn_weights
            and not config.scale_attn_by_inverse_layer_idx
            and not config.reorder_and_upcast_attn
            and not config.add_cross_attention
        )

    @torch.inference_mode()
    def __init__(self, model: Any, limits: Limits) -> None:
        body, config = model.transformer, model.config
        self.token_table, self.position_table = body.wte.weight, body.wpe.weight
        self.blocks = [Block(block) for block in body.h]
        self.final_norm = body.ln_f
        self.head = Linear(model.lm_head.weight, None)
        width = config.n_embd // config.n_head
        self.rule = Rule(1 / math.sqrt(width))
        shape = Shape(config.n_layer, config.n_head, width, self.token_table.dtype, model.device)
        products = [product for block in self.blocks for product in block.products]
        super().__init__(shape, 1, products, self.head, limits)
        if not self.reproducible:
            log.warning("matrix products here depend on the batch: runs may not repeat exactly")

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Tensor:
        layout = self._lay_out(plan)
        x = self.token_table[layout.tokens] + self.position_table[layout.positions]
        for index, block in enumerate(self.blocks):
            attended = self._look(block, index, block.norm_1(x), layout)
            x = block.out.plus(attended, x)
            x = block.down.plus(block.up(block.norm_2(x)), x)
        return self.head(self.final_norm(x[layout.wanted]))[: layout.sampled]

    def _look(self, block: Block, layer: int, x: Tensor, layout: Layout) -> Tensor:
        qkv = block.qkv(x).view(len(x), 3, self.shape.heads, self.shape.width)
        return self.attend(layout, layer, self.rule, qkv[:, 0], qkv[:, 1:]).flatten(1)
