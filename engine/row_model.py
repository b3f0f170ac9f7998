"""A Transformers model's own ``forward`` on one row of tokens of many sequences.

Norms, projections and whatever else an architecture has treat each token of a row alone; only
attention looks at others, and Transformers lets it be replaced. So a ``RowModel`` hands attention
to its caller, and what is left is right for any sequence's tokens in any order. Whether that is
so for a model is asked of the model itself (``Survey``): names and versions tell less.
Knows no sequences, no cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D

from engine.kv_cache import Shape
from engine.linear import Linear
from engine.ragged import Rule

NAME = "rows"  # of this attention, to Transformers

# Of a layer's number, its rule, queries [rows, query heads, width], and keys and values
# [rows, 2, heads, width]: what each row makes of what it looks at, [rows, query heads, width].
Attend = Callable[[int, Rule, Tensor, Tensor], Tensor]

# Arguments of attention that say nothing that the mask and the rule do not, or nothing here.
HARMLESS = {"dropout", "sliding_window", "position_ids", "position_embeddings", "use_cache"}


class UnsuitedError(Exception):
    """A model whose tokens cannot share a row; the message says why."""


class RowMask:
    """What a layer may look at, as Transformers defines it for positions."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.function(0, 0, queries, keys)


def row_mask(*, mask_function: Callable[..., Tensor], use_vmap: bool = False, **_: Any) -> RowMask:
    if use_vmap:
        raise UnsuitedError("it masks attention in its own way")
    return RowMask(mask_function)


def row_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    attend: Attend | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What each layer calls: ``query`` is [1, query heads, rows, width]."""
    given = {name for name, value in others.items() if value is not None and value is not False}
    unknown = sorted(given - HARMLESS)
    if attend is None or scaling is None or unknown or not isinstance(attention_mask, RowMask):
        raise UnsuitedError("its attention takes " + (", ".join(unknown) or "other arguments"))
    if key.shape != value.shape:
        raise UnsuitedError("its keys and values differ in shape")
    both = torch.stack([key[0], value[0]]).permute(2, 0, 1, 3)
    rule = Rule(scaling, softcap, attention_mask)
    out = attend(module.layer_idx, rule, query[0].transpose(0, 1), both)
    return out[None], None


AttentionInterface.register(NAME, row_attention)
AttentionMaskInterface.register(NAME, row_mask)


class RowModel:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, tokens: Tensor, positions: Tensor, wanted: Tensor, attend: Attend) -> Tensor:
        """Logits [wanted, vocabulary] of the rows ``wanted``; the others are [rows]."""
        with self._attention():
            out = self.model(
                tokens[None],
                position_ids=positions[None],
                attention_mask=torch.ones_like(tokens)[None],
                use_cache=False,
                logits_to_keep=wanted,
                attend=attend,
            )
        return out.logits[0]  # type: ignore[no-any-return]

    def up_to_second_layer(self, rows: Tensor) -> Tensor:
        """Of (token, position) rows that look at themselves alone: what the second layer's
        attention gets, or the logits, if there is none."""

        def attend(layer: int, _: Rule, queries: Tensor, both: Tensor) -> Tensor:
            if layer == 1:
                raise _Enough(torch.cat([queries, both.flatten(1, 2)], dim=1).flatten(1))
            return to_itself(queries, both)

        tokens, positions = rows.unbind(1)
        try:
            return self(tokens, positions, torch.arange(len(rows), device=rows.device), attend)
        except _Enough as enough:
            return enough.seen

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """For this call only: who else calls the model finds it as it was."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before


class _Enough(Exception):  # noqa: N818
    """Ends a forward early with what was wanted of it."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen


class Survey:
    """What a model does with a row. Raises UnsuitedError for what could mix its tokens."""

    def __init__(self, model: Any, context_size: int) -> None:
        self.row_model = RowModel(model)
        self.products = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
        self.head = model.get_output_embeddings()
        if type(self.head) is not nn.Linear:
            raise UnsuitedError("it has no plain output layer")
        for module in model.modules():
            if any(p.dim() > 1 for p in module.parameters(recurse=False)):
                self._check_owner(module)
        near, far = (self._looked_at(model, position) for position in (0, context_size - 1))
        for layer, (queries, both) in enumerate(near):
            if not torch.equal(queries[:-1], far[layer][0][:-1]):
                raise UnsuitedError("a token's numbers depend on the position of another")
            if (queries.shape, both.shape, both.dtype) != (
                near[0][0].shape,
                near[0][1].shape,
                queries.dtype,
            ):
                raise UnsuitedError("its layers' heads differ")
        queries, both = near[0]
        heads, width = both.shape[2:]
        self.shape = Shape(len(near), heads, width, both.dtype, both.device)
        self.groups = queries.shape[1] // heads

    def _check_owner(self, module: nn.Module) -> None:
        if module not in self.products and not isinstance(module, nn.Embedding):
            raise UnsuitedError(f"{type(module).__name__} has weights of its own")

    def _looked_at(self, model: Any, last_position: int) -> list[tuple[Tensor, Tensor]]:
        """Each layer's queries, and keys and values, of a row whose last position is given."""
        rows, sampled = 5, 2
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def attend(layer: int, rule: Rule, queries: Tensor, both: Tensor) -> Tensor:  # noqa: ARG001
            if layer in seen:
                raise UnsuitedError("a layer attends twice")
            seen[layer] = (queries, both)
            return to_itself(queries, both)

        def count(module: nn.Module, _: Any, out: Tensor) -> None:
            expected = sampled if module is self.head else rows
            if out.numel() != expected * out.shape[-1]:
                raise UnsuitedError(f"{type(module).__name__} sees some of the rows")

        hooks = [module.register_forward_hook(count) for module in self.products]
        tokens = torch.arange(rows, device=model.device)
        positions = torch.tensor([0, 1, 2, 1, last_position], device=model.device)
        try:
            self.row_model(tokens, positions, tokens[:sampled], attend)
        except UnsuitedError:
            raise
        except Exception as error:
            raise UnsuitedError(f"its forward raised {type(error).__name__}") from error
        finally:
            for hook in hooks:
                hook.remove()
        layers = model.config.get_text_config().num_hidden_layers
        if sorted(seen) != list(range(layers)):
            raise UnsuitedError("not every layer's attention can be replaced")
        return [seen[layer] for layer in range(layers)]


def to_itself(queries: Tensor, both: Tensor) -> Tensor:
    """Attention of rows that look at nothing but themselves."""
    return both[:, 1].repeat_interleave(queries.shape[1] // both.shape[2], dim=1)


def product_of(module: Any) -> Linear:
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    return Linear(weight, module.bias)


def pack(module: Any) -> Linear:
    """The product of a linear module, which computes it from now on, in calls of as many rows as
    are safe; its own weights are given up."""
    product = product_of(module)
    module.forward = product.on_any_shape
    module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
    return product
