"""The bare PyTorch step beside a run's step: the same model and loop, as anyone writes them in one file."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.harness import TrainStep
from config.schema import TrainingConfig
from model.config import GPTConfig
from model.rope import rotary_frequencies, rotary_tables

# The bare model's name of each parameter of a layer of ours.
BARE_NAMES = {
    "attention.qkv.layer_norm_weight": "attention_norm.weight",
    "attention.qkv.weight": "qkv.weight",
    "attention.output.weight": "output.weight",
    "mlp.layer_norm_weight": "mlp_norm.weight",
    "mlp.gate_weight": "gate.weight",
    "mlp.up_weight": "up.weight",
    "mlp.fc2_weight": "down.weight",
}


class BareLayer(nn.Module):
    """A pre-norm layer: grouped-query attention, SwiGLU."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = c.num_attention_heads, c.num_query_groups, c.kv_channels
        self.attention_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_epsilon)
        self.qkv = nn.Linear(c.hidden_size, c.qkv_size, bias=False)
        self.output = nn.Linear(c.query_size, c.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_epsilon)
        self.gate = nn.Linear(c.hidden_size, c.ffn_hidden_size, bias=False)
        self.up = nn.Linear(c.hidden_size, c.ffn_hidden_size, bias=False)
        self.down = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [b, s, h] -> [b, s, h]."""
        batch, length, _ = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, -1, self.head_dim)  # [b, s, hq + 2g, d]
        q, k, v = heads.transpose(1, 2).split((self.heads, self.groups, self.groups), dim=1)  # [b, hq or g, s, d]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [b, hq, s, d]
        x = x + self.output(out.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864); x [b, h, s, d]; cos, sin [s, d / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class BareGPT(nn.Module):
    """A decoder that returns whole logits."""

    def __init__(self, c: GPTConfig, seq_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.padded_vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(BareLayer(c) for _ in range(c.num_layers))
        self.final_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_epsilon)
        self.lm_head = nn.Linear(c.hidden_size, c.padded_vocab_size, bias=False)
        frequencies = rotary_frequencies(c)
        self.cos, self.sin = rotary_tables(torch.arange(seq_length), frequencies, dtype=torch.float32)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] -> logits [b, s, V]."""
        x = self.embedding(tokens)  # [b, s, h]
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.lm_head(self.final_norm(x))


def copy_weights(ours: TrainStep) -> dict[str, Tensor]:
    """Our weights, whole, by the bare model's names; in qkv all queries precede all keys and all values. Collective."""
    c, weights = ours.architecture, {}
    rows = torch.arange(c.qkv_size).view(c.num_query_groups, -1, c.kv_channels)  # of a group: queries, key, value
    rows = torch.cat([part.flatten() for part in rows.split((c.queries_per_group, 1, 1), dim=1)])
    for name, parameter in ours.model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for our_name, bare_name in BARE_NAMES.items():
            name = name.replace(our_name, bare_name)
        weights[name] = (whole[rows] if name.endswith("qkv.weight") else whole).detach().clone()
    return weights


class BareStep:
    """A plain loop: fp32 weights, whole logits, AdamW with decay on every weight.

    Args:
        autocast: compute in bf16 under `torch.autocast`.
    """

    def __init__(self, model: nn.Module, training: TrainingConfig, *, autocast: bool = False) -> None:
        self.model, self.max_norm, self.autocast = model, training.clip_grad, autocast
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=training.lr,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            weight_decay=training.weight_decay,
            fused=True,
        )

    def step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """One update on tokens and labels [b, s]. Returns this rank's mean loss before the update."""
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def build_bare_step(ours: TrainStep) -> BareStep:
    """The bare step from our weights; over several ranks under FSDP2, resharded as ours. Collective."""
    config = ours.config
    model = BareGPT(ours.architecture, config.data.seq_length)
    model.load_state_dict(copy_weights(ours))
    if dist.get_world_size() > 1:
        for module in (*model.layers, model):
            fully_shard(module, reshard_after_forward=config.parallel.reshard_after_forward == "on")
    return BareStep(model, config.training)
