"""What cannot move later: values that checkpoints, caches and golden losses of older commits rest on.

A change here is a change of format. Whoever makes it on purpose also raises the version that keys the cache
(`INDEX_VERSION`, `CACHE_VERSION`) and says so in CHANGELOG.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cp.packed_seq import IGNORE_LABEL
from data.indexed_dataset import DTYPES, token_dtype
from data.packing import concat_epoch, pack_epoch, resolve_packing
from data.split import split_documents
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from model.config import GPTConfig, padded_vocab_size
from model.init import initial_rows

LENGTHS = np.array([5, 40, 16, 1, 33, 8, 17, 4])


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("embedding.weight", 0, [0.0055594, 0.0233661, 0.0385789, 0.0123613]),
        ("layers.0.mlp.fc2_weight", 255, [0.0092887, -0.0191092, 0.0019551, -0.0089660]),
        ("layers.0.mlp.fc2_weight", 256, [-0.0224654, 0.0108204, 0.0073214, 0.0174730]),  # the first of the next block
    ],
)
def test_initial_weights(name: str, row: int, wanted: list[float]) -> None:
    # Not to the last bit: the generator's vector instructions may differ between machines.
    assert initial_rows(1234, name, row, row + 1, 16, 0.02)[0, :4].tolist() == pytest.approx(wanted, abs=1e-6)


def test_packing_of_an_epoch() -> None:
    epoch = pack_epoch(LENGTHS, seed=1234, epoch=1, seq_length=16, alignment=4)
    sequences = [epoch.sample_pieces(n).tolist() for n in range(len(epoch))]
    assert sequences == [
        [[6, 0, 16]],
        [[1, 0, 16]],
        [[4, 32, 1], [7, 0, 4]],
        [[0, 0, 5], [5, 0, 8]],
        [[1, 16, 16]],
        [[4, 16, 16]],
        [[3, 0, 1], [6, 16, 1], [1, 32, 8]],
        [[4, 0, 16]],
        [[2, 0, 16]],
    ]
    assert resolve_packing("auto", "thd") == "best-fit" and resolve_packing("auto", "bshd") == "concat"


def test_order_of_a_stream() -> None:
    assert concat_epoch(LENGTHS, seed=1234, epoch=0, seq_length=16).documents.tolist() == [5, 6, 7, 0, 4, 1, 3, 2]
    assert concat_epoch(LENGTHS, seed=1234, epoch=1, seq_length=16).documents.tolist() == [1, 4, 0, 2, 5, 7, 6, 3]


def test_splits() -> None:
    wanted = [[0, 2, 3, 4, 5, 7, 9, 11], [6, 10], [1, 8]]
    assert [part.tolist() for part in split_documents(12, (3.0, 1.0, 1.0))] == wanted


def test_token_files() -> None:
    assert [DTYPES[code] for code in (1, 2, 3, 4, 5, 8)] == [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]
    # Megatron-LM's border: 65499 is the last vocabulary whose ids are written in 16 bits.
    assert [token_dtype(n) for n in (65499, 65500)] == [np.uint16, np.int32]
    assert IGNORE_LABEL == -100


def test_special_ids(tmp_path: Path) -> None:
    byte = ByteTokenizer()
    assert (byte.vocab_size, byte.eod) == (257, 256)
    assert byte.encode("é").tolist() == [0xC3, 0xA9] and byte.decode([0xC3, 0xA9, byte.eod]) == "é"
    (tmp_path / "m.model").write_bytes(train_sentencepiece(["some text to learn from"], vocab_size=280))
    trained = SentencePieceTokenizer(tmp_path / "m.model")
    processor = trained.processor
    assert (trained.vocab_size, trained.eod) == (280, 1)
    assert (processor.unk_id(), processor.eos_id(), processor.bos_id(), processor.pad_id()) == (0, 1, -1, -1)


def test_shapes_that_a_tp_cut_and_a_checkpoint_rest_on() -> None:
    config = GPTConfig(
        num_layers=1,
        hidden_size=48,
        ffn_hidden_size=64,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=10,
        vocab_size=50,
        padded_vocab_size=128,
    )
    assert (config.queries_per_group, config.query_size) == (3, 60)
    assert config.qkv_size == 2 * (3 + 1 + 1) * 10
    assert padded_vocab_size(4097, 128) == 4224
