"""The peers' own context parallelism on CPU ranks against one rank in float64: make test-peers PEERS_PYTHON=python.

Each test states what a peer does today, right or wrong, and so fails when the peer mends it. The last test prints the
table and, with PEERS_JSON, writes it. Needs axolotl, nemo_automodel, accelerate, trl and ring_flash_attn (--no-deps),
transformers and datasets; see docs/comparison/nemo_vs_axolotl_cp.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.peers import ranks
from tests.peers.rows import IGNORED, LENGTHS, VOCAB, Row, draw_row, reference, trained_weights
from tests.reference import relative_error
from tests.world import RankError, World

for package in ("axolotl", "nemo_automodel", "accelerate", "trl", "ring_flash_attn", "transformers"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

pytestmark = pytest.mark.machine

BF16 = torch.bfloat16
CP_SIZES = (2, 4)
EXACT = 1e-5  # relative, of fp32 losses and gradients
ROUNDED = 0.05  # of bf16
AXOLOTL = dict(mechanism="axolotl", attention="flash_attention_2", layout="contiguous")
TORCH = dict(attention="sdpa", layout="zigzag")
BLOCKDIAG = dict(mechanism="nemo_blockdiag", attention="blockdiag", layout="contiguous")
CASES: dict[str, dict[str, Any]] = {
    "one rank, fp32": dict(mechanism="one_rank", attention="sdpa", layout="whole"),
    "one rank, bf16": dict(mechanism="one_rank", attention="sdpa", layout="whole", dtype=BF16),
    "Axolotl varlen_llama3": AXOLOTL | dict(sample_packing=True),
    "Axolotl varlen_llama3, heads_k_stride 2": AXOLOTL | dict(sample_packing=True, heads_k_stride=2),
    "Axolotl batch_ring, bf16": AXOLOTL | dict(sample_packing=False, dtype=BF16),
    "NeMo context_parallel": dict(mechanism="nemo_torch") | TORCH,
    "NeMo block-diagonal, all-gather": BLOCKDIAG | dict(exchange="allgather", kernel="dense"),
    "NeMo block-diagonal, halo, bf16": BLOCKDIAG | dict(exchange="halo", kernel="flash", dtype=BF16),
    "NeMo block-diagonal, a2a, bf16": BLOCKDIAG | dict(exchange="a2a", kernel="flash", dtype=BF16),
    "accelerate context_parallel": dict(mechanism="accelerate") | TORCH,
    "transformers Trainer, cp": dict(mechanism="trainer") | TORCH,
    "TRL SFTTrainer, packing, cp": dict(mechanism="sft_trainer") | TORCH,
}
ROWS = {"packed": draw_row(), "one document": draw_row((sum(LENGTHS),), prompt=0)}
SORTED = draw_row(tuple(sorted(LENGTHS, reverse=True)), prompt=0)  # as TRL packs them


def find_row(name: str, row: str) -> Row:
    return SORTED if name.startswith("TRL") and row == "packed" else ROWS[row]


@dataclass
class Figures:
    """Of one mechanism on one row."""

    mechanism: str
    row: str
    cp_size: int
    loss_ratio: float  # reported loss / reference
    grad_error: float  # the worst weight's
    grad_error_own: float  # against the reference with the mechanism's own targets and divisor
    leaked: int  # outputs of other documents that a changed token changes
    others: int
    skipped: list[int]  # places of targets that are not trained
    divisor: float
    targets: int


@dataclass
class Peers:
    """A world of ranks and what its cases showed."""

    world: World
    cp_size: int
    figures: dict[tuple[str, str], Figures]

    def measure(self, name: str, row_name: str) -> Figures:
        if (name, row_name) not in self.figures:
            self.figures[name, row_name] = self._measure(name, row_name)
        return self.figures[name, row_name]

    def step(self, name: str, row: Row, **changed: Any) -> list[ranks.Shown]:
        case = CASES[name] | changed
        return self.world.run(ranks.step, weights=trained_weights(), row=row, **case)

    def _measure(self, name: str, row_name: str) -> Figures:
        row, weights = find_row(name, row_name), trained_weights()
        shown = self.step(name, row)
        trained = {place: target for one in shown for place, target in one.trained.items()}
        wanted = {place: int(target) for place, target in enumerate(row.targets) if target != IGNORED}
        assert trained.items() <= wanted.items(), "a target that is none"
        true, own = reference(weights, row), reference(weights, row, places=set(trained))
        divisor = find_divisor(shown)
        grads = shown[0].grads
        changed_row = replace(row, tokens=row.tokens.clone())
        place = row.lengths[0] + 5 if len(row.lengths) > 1 else 5
        changed_row.tokens[place] = (row.tokens[place] + 1) % VOCAB  # in the second document
        logits, changed = (
            {p: x for one in s for p, x in one.logits.items()} for s in (shown, self.step(name, changed_row))
        )
        others = [p for p in logits if row.documents[p] != row.documents[place]]
        return Figures(
            name, row_name, self.cp_size, shown[0].loss / true.loss,
            max(relative_error(grads[n], true.grads[n]) for n in grads),
            max(relative_error(grads[n], own.grads[n] * own.targets / divisor) for n in grads),
            sum(not torch.equal(logits[p], changed[p]) for p in others), len(others),
            sorted(set(wanted) - set(trained)), divisor, true.targets,
        )  # fmt: skip


@pytest.fixture(scope="module", params=CP_SIZES, ids=lambda size: f"cp{size}")
def peers(request: pytest.FixtureRequest) -> Iterator[Peers]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # axolotl compiles batch_ring, for GPUs
    with World(request.param) as world:
        yield Peers(world, request.param, {})


def find_divisor(shown: list[ranks.Shown]) -> float:
    return next(one.divisor for one in shown if one.divisor is not None)


def boundaries(cp_size: int) -> list[int]:
    """Last places of the contiguous parts but the last one's."""
    return [(rank + 1) * sum(LENGTHS) // cp_size - 1 for rank in range(cp_size - 1)]


# ---------------------------------------------------------------------------------------------------
# Controls


@pytest.mark.parametrize("row", ROWS)
def test_the_reference_agrees_with_one_rank_of_the_model(peers: Peers, row: str) -> None:
    found = peers.measure("one rank, fp32", row)
    assert found.loss_ratio == pytest.approx(1, abs=EXACT) and found.grad_error < EXACT
    assert not found.leaked and not found.skipped
    found = peers.measure("one rank, bf16", row)
    assert found.loss_ratio == pytest.approx(1, abs=2e-3) and 1e-3 < found.grad_error < ROUNDED


# ---------------------------------------------------------------------------------------------------
# Axolotl


def test_axolotl_takes_batch_ring_for_rows_that_it_did_not_pack_and_for_those_it_did(peers: Peers) -> None:
    choose = ranks.axolotl_function
    assert peers.world.run(choose, sample_packing=True)[0] == "varlen_llama3"
    assert peers.world.run(choose, sample_packing=False)[0] == "batch_ring"  # also if the data is packed already
    assert peers.world.run(choose, sample_packing=True, ring_attn_func="batch_ring")[0] == "batch_ring"


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["Axolotl varlen_llama3", "Axolotl varlen_llama3, heads_k_stride 2"])
def test_varlen_llama3_separates_documents_and_skips_the_target_at_each_cut(peers: Peers, name: str, row: str) -> None:
    found = peers.measure(name, row)
    assert not found.leaked
    assert found.skipped == boundaries(peers.cp_size)
    counted = found.targets // peers.cp_size * peers.cp_size  # with the skipped targets, but see the next tests
    assert found.divisor == pytest.approx(counted, rel=1e-4)
    assert found.grad_error_own < EXACT  # nothing else is wrong
    assert found.grad_error > 100 * EXACT and abs(found.loss_ratio - 1) > 100 * EXACT


def test_batch_ring_lets_packed_documents_see_each_other(peers: Peers) -> None:  # axolotl issue 3608
    one, packed = (peers.measure("Axolotl batch_ring, bf16", row) for row in ("one document", "packed"))
    assert packed.leaked == sum(LENGTHS[2:])  # every output behind the changed document
    assert packed.loss_ratio > 1.3 and packed.grad_error > 1
    assert not one.leaked and one.loss_ratio == pytest.approx(1, abs=0.05) and one.grad_error_own < ROUNDED
    assert one.skipped == packed.skipped == boundaries(peers.cp_size)


def test_axolotl_divides_each_microbatch_by_its_own_count(peers: Peers) -> None:
    rows = [draw_row(prompt=prompt) for prompt in (12, 102)]
    counts = [int((row.targets != IGNORED).sum()) for row in rows]
    for row, count in zip(rows, counts, strict=True):
        found = find_divisor(peers.step("Axolotl varlen_llama3", row, gradient_accumulation_steps=2))
        assert found == pytest.approx(2 * (count // peers.cp_size) * peers.cp_size, rel=1e-4)
    assert counts[0] > 3 * counts[1]  # so a target of the second microbatch weighs three times as much


def test_axolotl_rounds_the_divisor_down(peers: Peers) -> None:
    row = draw_row(prompt=13)
    count = int((row.targets != IGNORED).sum())
    found = find_divisor(peers.step("Axolotl varlen_llama3", row))
    assert count % peers.cp_size and found == pytest.approx(count // peers.cp_size * peers.cp_size, rel=1e-4)


@pytest.mark.parametrize("name", ["Axolotl varlen_llama3", "Axolotl batch_ring, bf16"])
def test_axolotl_fails_on_a_row_that_cp_does_not_divide(peers: Peers, name: str) -> None:
    # It would pad the row, but hands ring-flash-attn the lengths before.
    row = draw_row((*LENGTHS[:-1], LENGTHS[-1] - 1))
    with pytest.raises(RankError, match="assert total_length % world_size == 0"):
        peers.step(name, row)


def test_axolotl_weighs_evaluation_by_labels_of_which_some_have_no_target(peers: Peers) -> None:
    row, weights = ROWS["packed"], trained_weights()
    found = peers.world.run(ranks.evaluate_axolotl, weights, row)[0]
    assert found != pytest.approx(reference(weights, row).loss, rel=1e-4)
    places = [set(range(*part)) for part in _parts(peers.cp_size)]
    total = 0.0
    for part in places:
        trained = part - {max(part)}
        total += reference(weights, row, places=trained).loss * sum(int(row.labels[p] != IGNORED) for p in part)
    assert found == pytest.approx(total / int((row.labels != IGNORED).sum()), rel=EXACT)


def _parts(cp_size: int) -> list[tuple[int, int]]:
    size = sum(LENGTHS) // cp_size
    return [(rank * size, (rank + 1) * size) for rank in range(cp_size)]


def test_gradients_through_axolotls_gather_are_a_cp_th(peers: Peers) -> None:
    assert peers.world.run(ranks.gather_gradient)[0] == pytest.approx(1 / peers.cp_size)


# ---------------------------------------------------------------------------------------------------
# PyTorch's context_parallel under NeMo AutoModel and Hugging Face


@pytest.mark.parametrize(
    "name",
    ["NeMo context_parallel", "accelerate context_parallel", "transformers Trainer, cp", "TRL SFTTrainer, packing, cp"],
)
def test_context_parallel_is_exact_on_one_document_and_leaks_when_packed(peers: Peers, name: str) -> None:  # TRL 6843
    one, packed = (peers.measure(name, row) for row in ("one document", "packed"))
    printed = 1e-3 if "Trainer" in name else EXACT  # Trainer logs four digits
    assert one.loss_ratio == pytest.approx(1, abs=printed) and one.grad_error < EXACT and not one.skipped
    assert one.divisor == pytest.approx(one.targets, rel=1e-4)
    lengths = find_row(name, "packed").lengths
    assert packed.leaked == sum(lengths[2:]) and packed.others == sum(lengths) - lengths[1]
    assert packed.loss_ratio > 1.3 and packed.grad_error > 1
    assert not packed.skipped and packed.divisor == pytest.approx(packed.targets, rel=1e-4)


def test_nemo_refuses_packed_rows_for_stock_models() -> None:
    patches = pytest.importorskip("nemo_automodel._transformers.kernel_patches")
    with pytest.raises(ValueError, match="Packed sequence is only supported with CP size 1"):
        patches._apply_preload_overrides(1, 2, True, "sdpa", False)


# ---------------------------------------------------------------------------------------------------
# NeMo AutoModel's block-diagonal exchange


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", [name for name in CASES if "block-diagonal" in name])
def test_the_block_diagonal_exchange_is_exact(peers: Peers, name: str, row: str) -> None:
    found = peers.measure(name, row)
    limit = ROUNDED if "bf16" in name else EXACT
    assert found.loss_ratio == pytest.approx(1, abs=limit / 10) and found.grad_error < limit
    assert not found.leaked and not found.skipped
    assert found.divisor == pytest.approx(found.targets, rel=5e-3)


# ---------------------------------------------------------------------------------------------------


def test_table(peers: Peers, capsys: pytest.CaptureFixture[str]) -> None:
    found = [peers.measure(name, row) for name in CASES for row in ROWS]
    packages = ("axolotl", "nemo_automodel", "accelerate", "transformers", "trl", "ring-flash-attn", "torch")
    lines = [
        f"cp {peers.cp_size}, {', '.join(f'{name} {version(name)}' for name in packages)}", "",
        "| mechanism | row | loss / reference | worst gradient error | with its own targets and divisor "
        "| leaked outputs | targets skipped | divisor / targets |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for f in found:
        lines.append(
            f"| {f.mechanism} | {f.row} | {f.loss_ratio:.4f} | {f.grad_error:.1e} | {f.grad_error_own:.1e} "
            f"| {f.leaked} of {f.others} | {len(f.skipped)} of {f.targets} | {f.divisor / f.targets:.3f} |"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    if path := os.environ.get("PEERS_JSON"):
        file = Path(path)
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept["packages"] = {name: version(name) for name in packages}
        kept[f"cp {peers.cp_size}"] = [asdict(f) for f in found]
        file.write_text(json.dumps(kept, indent=1) + "\n")
