"""A few tokens of generated text, through the same forward pass that trains."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from cp.packed_seq import build_packed_seq
from parallel.fsdp import reshard_model
from parallel.grid import Grid


@torch.no_grad()
def generate(
    model: nn.Module,
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
        logits = model(
            torch.from_numpy(row[owned]).to(device),
            packed_seq.move(lambda x: x.to(device)),
            logits_rows=torch.from_numpy(last).to(device),
        ).float()
        total = logits.sum(0)  # [V]; zeros where the token is another rank's
        dist.all_reduce(total, group=grid.group("cp"))
        total = total.cpu()
        if temperature > 0:
            chosen = int(torch.multinomial(torch.softmax(total / temperature, -1), 1, generator=generator))
        else:
            chosen = int(total.argmax())
        draw = torch.tensor([chosen], device=device)
        dist.broadcast(draw, src=0)  # one draw for all, whatever the last bit of their logits
        chosen = int(draw)
        if chosen == eod:
            break
        ids.append(chosen)
    reshard_model(model)
    model.train()
    return ids[len(prompt) :]
