"""A few tokens of generated text, through the same forward pass that trains."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from cp.packed_seq import build_packed_seq
from data.batch import Batch
from model.gpt import GPT, Stages
from parallel.grid import AXES, Grid, rank_of
from training.step import finish_forward, forward_only


@torch.no_grad()
def generate(
    model: GPT | Stages,
    prompt: list[int],
    *,
    num_tokens: int,
    grid: Grid,
    device: torch.device,
    alignment: int,
    qkv_format: str,
    layout: str,
    pad_token: int,
    eod: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:
    """Continue `prompt` by up to `num_tokens` ids; stops at `eod`. Every rank of the grid takes part.

    The text grows as one document of a padded row cut over cp, so each token costs a whole forward pass. The
    draw is seeded and the same on every rank.

    Args:
        prompt: at least one id.
        temperature: 0 takes the most likely token.
    """
    model.eval()
    cp_size, cp_rank = grid.size("cp"), grid.rank("cp")
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(num_tokens):
        padded = np.array([-(-len(ids) // alignment) * alignment])
        packed_seq, owned = build_packed_seq(
            np.array([len(ids)]), padded, cp_size=cp_size, cp_rank=cp_rank, qkv_format=qkv_format, layout=layout
        )
        row = np.full(int(padded[0]), pad_token, np.int64)
        row[: len(ids)] = ids
        last = np.flatnonzero(owned == len(ids) - 1)  # one row on the rank that owns the last token, else none
        tokens = torch.from_numpy(row[owned])
        batch = Batch(tokens, tokens, packed_seq, loss_tokens=0, real_tokens=len(ids), cp_balance=1.0).to(device)
        draw = torch.zeros(1, dtype=torch.int64, device=device)
        for logits in forward_only(
            model, [batch], grid, logits_rows=torch.from_numpy(last).to(device)
        ):  # none before the last stage
            total = logits.float().sum(0)  # [V]; zeros where the token is another rank's
            dist.all_reduce(total, group=grid.group("cp"))
            total = total.cpu()
            if temperature > 0:
                draw += int(torch.multinomial(torch.softmax(total / temperature, -1), 1, generator=generator))
            else:
                draw += int(total.argmax())
        # One draw for all, whatever the last bit of their logits: that of the last stage's first rank.
        dist.broadcast(draw, src=rank_of(grid.sizes, dict.fromkeys(AXES, 0) | {"pp": grid.size("pp") - 1}))
        chosen = int(draw)
        if chosen == eod:
            break
        ids.append(chosen)
    finish_forward(model)
    return ids[len(prompt) :]
