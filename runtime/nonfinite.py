"""A loss or gradient that is not finite: what is kept of its step, so that `tools/replay.py` runs it again."""

from __future__ import annotations

import json
import math
import platform
import zipfile
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.dataset import PackedSample, SampleDataset
from metrics.log import NonFinite
from parallel.fsdp import local_tensor
from parallel.grid import Grid, coordinates_of
from utils.errors import UserError
from utils.files import replace_synced


def bad_gradients(model: nn.Module) -> list[str]:
    """Parameters whose gradient on this rank holds something that is not finite."""
    return [
        n for n, p in model.named_parameters() if p.grad is not None and not bool(local_tensor(p.grad).isfinite().all())
    ]


def save_step(
    place: Path, *, step: int, told: dict[str, Any], sequences: SampleDataset, numbers: range, facts: dict[str, Any]
) -> None:
    """Write the sequences of a step and what is known of it; to be called on one rank.

    Args:
        place: the JSON file; the sequences go beside it as .npz.
        step: as the log counts, from 1.
        told: its loss, gradient norm and what the ranks said of them.
        numbers: of its sequences.
        facts: what a replay needs beside them, as JSON.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = [sequences.sample(n) for n in numbers]
    scratch = place.with_name(f".{place.stem}.part.npz")
    np.savez(
        scratch,
        tokens=np.stack([r.tokens for r in rows]),
        labels=np.stack([r.labels for r in rows]),
        documents=np.array([len(r.lengths) for r in rows]),
        lengths=np.concatenate([r.lengths for r in rows]),
        padded_lengths=np.concatenate([r.padded_lengths for r in rows]),
        first_ids=np.array([r.first_id for r in rows]),
    )
    scratch.replace(place.with_suffix(".npz"))
    replace_synced(
        place, json.dumps({"step": step, "sequences": [numbers.start, numbers.stop], **facts, **told}, indent=1) + "\n"
    )


def tell_ranks(model: nn.Module, cross_entropy: Tensor, grid: Grid) -> list[dict[str, Any]]:
    """What each rank holds that is not finite. Collective over the world; before gradients are cleared."""
    names = bad_gradients(model)
    mine = {
        "rank": grid.global_rank,
        "host": platform.node(),
        "coordinates": coordinates_of(grid.sizes, grid.global_rank),
        "own_loss_is_finite": math.isfinite(float(cross_entropy)),
        "bad_gradients": len(names),
        "first_bad_gradients": names[:16],
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


class StoredSequences:
    """The sequences of one step, from the file that `save_step` wrote.

    Raises:
        ValueError: no such file, or not one of these.
    """

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays = {
                    name: found[name]
                    for name in ("tokens", "labels", "documents", "lengths", "padded_lengths", "first_ids")
                }
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not the rows of a step ({' '.join(str(error).split())})") from error
        ends = np.cumsum(arrays["documents"])
        self.rows = []
        for number, end in enumerate(ends):
            piece = slice(int(end - arrays["documents"][number]), int(end))
            row = PackedSample(
                arrays["tokens"][number],
                arrays["labels"][number],
                arrays["lengths"][piece],
                arrays["padded_lengths"][piece],
            )
            row.first_id = int(arrays["first_ids"][number])
            self.rows.append(row)
        self.seq_length, self.samples_per_epoch = arrays["tokens"].shape[1], len(self.rows)

    def sample(self, n: int) -> PackedSample:
        return self.rows[n]

    def empty_sample(self) -> PackedSample:
        raise AssertionError("a step is whole")

    def fingerprint(self) -> str:
        return "a stored step"

    def state_dict(self, n: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Nothing to do."""


class NonFiniteGuard:
    """What a run does about a step whose loss or gradient is not finite, before its update.

    Args:
        skip: pass over such steps, at most `most` in a row; else the first ends the run.
        looks: ask the device at every step. Without, on CUDA, a step is only found at the next line of the log, after its update.
        folder: gets the files of such steps.
        save: called on one rank as save(file, step, facts).
        control_group: over all ranks, for host memory: a number that only one replica sees must stop all.
        save_weights: called on all ranks as save_weights(step - 1) before the run ends; returns words for the message.
        flush: called before the run ends: what the steps before still have to write.
    """

    def __init__(
        self,
        *,
        skip: bool,
        most: int,
        looks: bool,
        model: nn.Module,
        grid: Grid,
        folder: Path,
        save: Callable[[Path, int, dict[str, Any]], None],
        control_group: dist.ProcessGroup,
        save_weights: Callable[[int], str] = lambda step: "",
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        self.skip, self.most, self.looks, self.model, self.grid, self.folder, self.save = (
            skip,
            most,
            looks,
            model,
            grid,
            folder,
            save,
        )
        self.control_group = control_group
        self.save_weights, self.flush, self.skipped, self.in_a_row = save_weights, flush, 0, 0

    def passes(self, step: int, loss: Tensor, grad_norm: Tensor, cross_entropy: Tensor) -> bool:
        """Whether the step, counted from 1, may update the weights. Where it may not: collective over the world.

        Args:
            loss, grad_norm: of the whole grid.
            cross_entropy: this rank's part of the loss.

        Raises:
            NonFinite: the run ends here.
        """
        if not self.looks or not self._is_bad_somewhere(loss, grad_norm):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        ranks = tell_ranks(self.model, cross_entropy, self.grid)
        told = self.keep(step, float(loss), float(grad_norm), ranks)
        if self.skip and self.in_a_row <= self.most:
            if dist.get_rank() == 0:
                print(f"step {step}: skipped, loss {float(loss)}, gradient norm {float(grad_norm)}{told}", flush=True)
            return False
        self.flush()
        much = f"; {self.in_a_row} such steps in a row (--max-skipped-in-a-row {self.most})" if self.skip else ""
        raise NonFinite(step, float(loss), float(grad_norm), told + much + self.save_weights(step - 1))

    def _is_bad_somewhere(self, *values: Tensor) -> bool:
        """Waits for the device."""
        bad = torch.tensor([not all(math.isfinite(float(v)) for v in values)], dtype=torch.int32)
        if self.control_group.size() > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(bad)

    def keep(self, step: int, loss: float, grad_norm: float, ranks: list[dict[str, Any]]) -> str:
        """Write the step's file on one rank; where and what, for the message."""
        place = self.folder / f"step_{step:07d}.json"
        if dist.get_rank() == 0:
            try:
                self.save(place, step, {"loss": loss, "grad_norm": grad_norm, "ranks": ranks})
            except OSError as error:
                return f"; {in_words(ranks)}; its rows could not be kept in {place}: {error.strerror or error}"
        return f"; {in_words(ranks)}; its rows are in {place} (tools/replay.py)"


def in_words(ranks: ListLike[dict[str, Any]]) -> str:
    """Who had it: for the line that ends the run."""
    if not ranks:
        return "found after its update"
    bad = [r for r in ranks if not r["own_loss_is_finite"]]
    if bad:
        return "loss not finite on rank " + ", ".join(f"{r['rank']} ({r['host']})" for r in bad[:8])
    bad = [r for r in ranks if r["bad_gradients"]]
    if not bad:
        return "no single rank's part is"
    return "gradients not finite on rank " + ", ".join(
        f"{r['rank']} ({r['host']}: {r['first_bad_gradients'][0]})" for r in bad[:8]
    )
