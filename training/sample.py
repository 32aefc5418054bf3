"""A few tokens of generated text, through the same forward pass that trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from config.schema import RunConfig
from cp.layout import document_unit
from cp.packed_seq import build_packed_seq
from data.batch import Batch
from data.tokenizer import TokenIds, Tokenizer, UnencodableText
from metrics.tensorboard import TensorBoardWriter
from model.gpt import GPT, Stages
from parallel.grid import AXES, Grid, rank_of
from runtime.distributed import Ranks
from training.step import finish_forward, forward_only
from utils.errors import UserError
from utils.logger import log


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
    eod: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:
    """Continue `prompt` by up to `num_tokens` ids; stops at `eod`. Collective over the grid.

    The text grows as one document of a padded row that is sharded over cp, so each token costs a whole forward pass.
    The draw is seeded and equal on every rank.

    Args:
        prompt: at least one id.
        alignment: the row's length is a multiple of this number of tokens.
        temperature: 0 takes the most likely token.
    """
    model.eval()
    cp_size, cp_rank = grid.size("cp"), grid.rank("cp")
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(num_tokens):
        padded = np.array([-(-len(ids) // alignment) * alignment])
        packed_seq, owned = build_packed_seq(
            np.array([len(ids)]),
            padded,
            cp_size=cp_size,
            cp_rank=cp_rank,
            qkv_format=qkv_format,
            layout=layout,
        )
        row = np.full(int(padded[0]), eod, np.int64)
        row[: len(ids)] = ids
        last = np.flatnonzero(owned == len(ids) - 1)  # empty unless this rank owns the last token
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
        # Logits may differ in the last bit between ranks: all take the draw of the last stage's first rank.
        dist.broadcast(draw, src=rank_of(grid.sizes, dict.fromkeys(AXES, 0) | {"pp": grid.size("pp") - 1}))
        chosen = int(draw)
        if chosen == eod:
            break
        ids.append(chosen)
    finish_forward(model)
    return ids[len(prompt) :]


@dataclass(frozen=True)
class TextSampler:
    """Generates --sample-tokens from --sample-prompt and prints the text. Every rank takes part."""

    model: GPT | Stages
    tokenizer: Tokenizer
    config: RunConfig
    ranks: Ranks
    writers: Sequence[TensorBoardWriter]

    def run(self, when: str) -> None:
        """Sample once. Collective. Args: when: such as "before training", for the title."""
        logging, parallel = self.config.logging, self.config.parallel
        if not logging.sample_tokens or isinstance(self.tokenizer, TokenIds):
            return
        self.ranks.watchdog.heartbeat("a sample")
        tokenizer = self.tokenizer
        try:
            prompt = tokenizer.encode_prompt(logging.sample_prompt)
        except UnencodableText as error:
            raise UserError(f"--sample-prompt {error}") from error
        ids = generate(
            self.model,
            prompt,
            num_tokens=logging.sample_tokens,
            grid=self.ranks.grid,
            device=self.ranks.device,
            alignment=math.lcm(
                self.config.data.document_alignment,
                document_unit("zigzag", parallel.cp_size),
                parallel.cp_size * parallel.tp_size,
            ),
            qkv_format=self.config.data.qkv_format,
            layout=parallel.cp_layout,
            eod=tokenizer.eod,
            seed=self.config.training.seed,
        )
        if self.ranks.is_writer:
            text = tokenizer.decode([*prompt, *ids])  # decoded alone, the new ids may lose a space
            log(f"\n----- sample {when} -----\n{text}\n-----\n")
            for writer in self.writers:
                writer.text(f"sample/{when.replace(' ', '_')}", text)
