"""The row, the model and the float64 reference of `make test-peers`, and what is read off a step of a peer.

Each document repeats a pattern of PERIOD tokens of its own, so a trained model copies the token PERIOD positions back.
Positions restart with each document: where documents see each other, the model copies from the wrong one, and the loss
rises.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.reference import reference_loss

VOCAB, PERIOD, SEED = 64, 4, 1234
LENGTHS = (23, 50, 9, 31, 15)  # no cut of 2 or 4 equal parts is a document's end
PROMPT = 12  # tokens of the first document without a label, so that the cp ranks' label counts differ
IGNORED = -100
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, rms_norm_eps=1e-6,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of tokens. labels: as a Hugging Face collator makes them, not shifted."""

    tokens: Tensor  # [T]
    labels: Tensor  # [T]
    lengths: tuple[int, ...]

    @property
    def positions(self) -> Tensor:
        return torch.cat([torch.arange(n) for n in self.lengths])

    @property
    def documents(self) -> Tensor:
        """Each token's document, from 1."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)) + 1, torch.tensor(self.lengths))

    @property
    def targets(self) -> Tensor:
        """[T]: the label of the next token, IGNORED at the row's end."""
        return torch.nn.functional.pad(self.labels[1:], (0, 1), value=IGNORED)


def draw_row(lengths: tuple[int, ...] = LENGTHS, *, seed: int = SEED, prompt: int = PROMPT) -> Row:
    rng = np.random.default_rng(seed)
    documents = [np.resize(rng.integers(0, VOCAB, PERIOD), n) for n in lengths]
    tokens = torch.from_numpy(np.concatenate(documents))
    labels = tokens.clone()
    labels[torch.cat([torch.arange(n) for n in lengths]) == 0] = IGNORED
    labels[:prompt] = IGNORED
    return Row(tokens, labels, lengths)


def build_model(attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """A Hugging Face Llama. attention: a name of its attention functions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")).to(dtype)
    model.config._attn_implementation = attention
    return model


def canonical(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and layouts of tests/reference.py, differentiable in the model's weights."""
    heads, groups = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    found = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "final_norm.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        own = {n.split(".", 3)[3]: w for n, w in weights.items() if n.startswith(f"model.layers.{layer}.")}
        q, k, v = (
            own[f"self_attn.{x}_proj.weight"].unflatten(0, (groups, -1, SHAPE["hidden_size"] // heads)) for x in "qkv"
        )
        found |= {
            f"layers.{layer}.attention.qkv.layer_norm_weight": own["input_layernorm.weight"],
            f"layers.{layer}.attention.qkv.weight": torch.cat((q, k, v), 1).flatten(0, 2),
            f"layers.{layer}.attention.output.weight": own["self_attn.o_proj.weight"],
            f"layers.{layer}.mlp.layer_norm_weight": own["post_attention_layernorm.weight"],
            f"layers.{layer}.mlp.gate_weight": own["mlp.gate_proj.weight"],
            f"layers.{layer}.mlp.up_weight": own["mlp.up_proj.weight"],
            f"layers.{layer}.mlp.fc2_weight": own["mlp.down_proj.weight"],
        }
    return found


@dataclass
class Reference:
    loss: float  # mean over the targets
    grads: dict[str, Tensor]
    targets: int


def reference(weights: dict[str, Tensor], row: Row, *, places: set[int] | None = None) -> Reference:
    """Loss and gradients of one rank in float64, by code that shares nothing with the peers or with cp/.

    places: of the targets that count; the others are dropped. None: all.
    """
    config = SimpleNamespace(
        vocab_size=VOCAB, kv_channels=SHAPE["hidden_size"] // SHAPE["num_attention_heads"], rotary_base=1e4,
        num_layers=SHAPE["num_hidden_layers"], num_attention_heads=SHAPE["num_attention_heads"],
        num_query_groups=SHAPE["num_key_value_heads"], norm_epsilon=SHAPE["rms_norm_eps"], qk_norm=False,
        hidden_dropout=0.0, attention_dropout=0.0, tie_embeddings=False,
    )  # fmt: skip
    leaves = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
    targets = row.targets.clone()
    if places is not None:
        targets[[place not in places for place in range(len(targets))]] = IGNORED
    total = reference_loss(canonical(leaves), config, row.tokens, targets, row.lengths, row.lengths)
    number = int((targets != IGNORED).sum())
    mean = total / number
    mean.backward()
    return Reference(mean.item(), {name: w.grad for name, w in leaves.items()}, number)


@functools.cache
def trained_weights(steps: int = 300) -> dict[str, Tensor]:
    """Weights that copy, trained on one rank over packed rows with a mask of their own; float32 of bf16 values."""
    model = build_model("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    rng = np.random.default_rng(SEED)
    for step in range(steps):
        lengths, left = [], 96
        while left:
            lengths.append(min(left, int(rng.integers(6, 48))))
            left -= lengths[-1]
        row = draw_row(tuple(lengths), seed=step, prompt=0)
        seen = (row.documents[:, None] == row.documents[None, :]).tril()
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
        logits = model(input_ids=row.tokens[None], position_ids=row.positions[None], attention_mask=mask).logits[0]
        torch.nn.functional.cross_entropy(logits, row.targets, ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: w.detach().bfloat16().float() for name, w in model.state_dict().items()}
