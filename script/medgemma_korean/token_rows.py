"""Training of the new token rows alone: old and new rows apart, and no gradient of the size of the whole matrix.

    token_rows.apart(model)              # a PeftModel whose adapter has trainable token rows; once, after loading
    token_rows.after_head(model)         # when TRL has put its fused head on the model; undone by without_head

PEFT's `trainable_token_indices` copies the matrix for the embedding and again for the head in every forward pass, and
its backward pass makes a dense rows x hidden gradient of each copy: 5.6 GB on a 4B with 272,192 rows, 11.7 GB on a
27B. Here the parameter is PEFT's own (n x hidden, `trainable_tokens_delta`), so that what is saved, loaded and merged
is its standard form; only the computation differs:

* every forward pass writes the n rows into the frozen matrix, in place, and nothing is copied;
* the embedding takes the new rows from the parameter, so that its gradient is n x hidden;
* the head is multiplied tile by tile by TRL, without a gradient of the matrix; the part that belongs to the new rows
  is added from what softmax and cross-entropy give: d loss / d row_j = sum_t g_t (1[y_t = j] - p_tj) h_t.

torch is imported inside functions.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any

# Tokens whose logits of the new rows are there at a time, as in TRL's head: 4,096 x 10,000 fp32 are 164 MB.
TOKENS_AT_A_TIME = 4096


def layer_of(model: Any) -> Any | None:
    """PEFT's layer that holds the trainable rows; None where the adapter has none."""
    return getattr(model.get_base_model().get_input_embeddings(), "token_adapter", None)


def span(layer: Any) -> tuple[int, int]:
    """(first id, end) of the rows that train. Raises AssertionError unless they lie side by side."""
    ids = layer.token_indices["default"]
    assert list(ids) == list(range(ids[0], ids[0] + len(ids))), "the new rows do not lie side by side"
    return ids[0], ids[0] + len(ids)


def apart(model: Any) -> None:
    """Make the embedding and the tied head of a PeftModel keep new and old rows apart; nothing where none trains."""
    layer = layer_of(model)
    if layer is None:
        return
    first, end = span(layer)
    head = getattr(model.get_base_model().get_output_embeddings(), "token_adapter", None)
    assert head is not None and head.tied_adapter is layer, "the head is not tied to the embedding"

    layer.forward = lambda ids: _embed(layer, ids, first, end)
    head.forward = lambda states: _logits(layer, states, first, end)
    # Asked by the embedding's and by the head's wrapper (`lm_head.weight`): the matrix itself, which holds the rows
    # since the embedding of the same forward pass has written them.
    layer.get_merged_weights = head.get_merged_weights = lambda _: layer.base_layer.weight


def _embed(layer: Any, ids: Any, first: int, end: int) -> Any:
    """Embeddings [..., hidden] of token ids, with a gradient to the rows that train; writes these into the matrix."""
    import torch
    from torch.nn import functional

    weight, rows = layer.base_layer.weight, layer.trainable_tokens_delta["default"]
    with torch.no_grad():
        weight[first:end].copy_(rows)
    embedded = functional.embedding(ids, weight, padding_idx=layer.base_layer.padding_idx)
    if rows.requires_grad and torch.is_grad_enabled():
        new = (ids >= first) & (ids < end)
        there = functional.embedding((ids - first).clamp(0, end - first - 1), rows).to(embedded.dtype)
        embedded = torch.where(new.unsqueeze(-1), there, embedded)
    scale = layer.base_layer.embed_scale  # Gemma multiplies its embeddings by sqrt(hidden)
    return embedded * scale.to(embedded.dtype)


def _logits(layer: Any, states: Any, first: int, end: int) -> Any:
    """Logits [..., rows] of states [..., hidden], in parts where the rows train: for forward passes without TRL's head,
    such as generation, or a loss of one's own.
    """
    import torch
    from torch.nn import functional

    weight, rows = layer.base_layer.weight, layer.trainable_tokens_delta["default"]
    if not (rows.requires_grad and torch.is_grad_enabled()):
        return functional.linear(states, weight)
    parts = (weight[:first], rows.to(weight.dtype), weight[end:])
    return torch.cat([functional.linear(states, part) for part in parts], dim=-1)


def after_head(model: Any) -> None:
    """Give the fused head that TRL has put on the model's forward the gradient of the rows that train."""
    layer = layer_of(model)
    if layer is None:
        return
    base = model.get_base_model()
    fused, seen = base.forward, []
    layer.head_hook = base.model.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))

    def forward(self: Any, *args: Any, labels: Any = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        seen.clear()
        if not fused_lm_head:
            return fused(*args, **kwargs, **({"labels": labels} if labels is not None else {}))
        output = fused(*args, labels=labels, fused_lm_head=True, **kwargs)
        hidden = seen.pop()[:, :-1]
        output.log_probs = _with_rows(output.log_probs, hidden, labels[:, 1:], layer)
        return output

    base.forward = types.MethodType(forward, base)


def without_head(model: Any) -> None:
    """Undo what TRL, accelerate and `after_head` have put on the forward passes for a training."""
    layer = layer_of(model)
    if hasattr(layer, "head_hook"):
        layer.head_hook.remove()
        del layer.head_hook
    for module in (model, model.get_base_model()):
        for name in ("forward", "_original_forward"):
            vars(module).pop(name, None)


def _with_rows(log_probs: Any, hidden: Any, labels: Any, layer: Any) -> Any:
    """Log-probabilities as they are, whose gradient reaches the rows that train too.

    log_probs: [batch, length], 0 where labels are -100; hidden: [batch, length, width], the states before the head.
    """
    import torch

    mask = labels != -100
    rows, weight = layer.trainable_tokens_delta["default"], layer.base_layer.weight
    kind = log_probs.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    scored = _row_gradient().apply(log_probs[mask], hidden[mask], rows, weight, labels[mask], span(layer)[0], dtype)
    return torch.zeros_like(log_probs).masked_scatter(mask, scored)


@cache
def _row_gradient() -> Any:
    """The autograd function: the identity on log-probabilities [n] in the forward pass; in the backward pass the
    gradient of the rows that train. The hidden states have all of theirs from TRL's function."""
    import torch

    class RowGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, log_probs, hidden, rows, weight, targets, first, dtype):
            # log p = logit - log Z. The logit is rounded as the head's own tile is, or log Z would be another one.
            chosen = torch.bmm(hidden.to(dtype).unsqueeze(1), weight[targets].to(dtype).unsqueeze(2)).flatten()
            ctx.save_for_backward(hidden, rows, targets - first, chosen.float() - log_probs)
            ctx.dtype = dtype
            return log_probs.clone()

        @staticmethod
        def backward(ctx, gradient):
            hidden, rows, local, log_z = ctx.saved_tensors
            total = torch.zeros(rows.shape, device=rows.device)
            matrix = rows.to(ctx.dtype)
            for at in range(0, len(hidden), TOKENS_AT_A_TIME):
                part = slice(at, at + TOKENS_AT_A_TIME)
                states, wanted, g = hidden[part].to(ctx.dtype), local[part], gradient[part].float()
                tile = (states @ matrix.t()).float().sub_(log_z[part].unsqueeze(1)).exp_().mul_(-g.unsqueeze(1))
                inside = ((wanted >= 0) & (wanted < len(rows))).nonzero().flatten()
                tile[inside, wanted[inside]] += g[inside]
                _add_product(total, tile.to(ctx.dtype).t(), states)
            return gradient, None, total.to(rows.dtype), None, None, None, None

    return RowGradient


def _add_product(total: Any, a: Any, b: Any) -> None:
    """total += a @ b, summed in float32: a sum rounded to bfloat16 between tiles would be biased."""
    import torch

    if total.device.type == "cuda" and a.dtype == torch.bfloat16:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
