"""Files written here and read by megatron-core itself, and the other way round: `make test-megatron MEGATRON=DIR`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.indexed_dataset import IndexedDataset, index_file, token_file, write_indexed_dataset

theirs = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed: make test-megatron"
)


@pytest.fixture(params=[100, 100_000], ids=["uint16", "int32"])
def documents(request) -> tuple[list[np.ndarray], int]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, request.param, n) for n in (5, 1, 3000, 17, 8192)], request.param


def build(prefix: Path, documents: list[list[np.ndarray]], vocab_size: int) -> None:
    """With their builder, a list of sequences a document."""
    builder = theirs.IndexedDatasetBuilder(str(token_file(prefix)), dtype=theirs.DType.optimal_dtype(vocab_size))
    for sequences in documents:
        builder.add_document(np.concatenate(sequences), [len(s) for s in sequences])
    builder.finalize(str(index_file(prefix)))


def test_they_read_ours(tmp_path: Path, documents) -> None:
    texts, vocab_size = documents
    write_indexed_dataset(tmp_path / "p", texts, vocab_size=vocab_size)
    read = theirs.IndexedDataset(str(tmp_path / "p"))
    assert len(read) == len(texts) and read.document_indices.tolist() == list(range(len(texts) + 1))
    assert all((read[n] == text).all() for n, text in enumerate(texts))


def test_both_write_the_same_bytes(tmp_path: Path, documents) -> None:
    texts, vocab_size = documents
    write_indexed_dataset(tmp_path / "ours", texts, vocab_size=vocab_size)
    build(tmp_path / "theirs", [[text] for text in texts], vocab_size)
    for file in (index_file, token_file):
        assert file(tmp_path / "ours").read_bytes() == file(tmp_path / "theirs").read_bytes()


def test_we_read_theirs_of_several_sequences_a_document(tmp_path: Path, documents) -> None:
    texts, vocab_size = documents
    build(tmp_path / "p", [[texts[0], texts[1]], [texts[2]], [texts[3], texts[4]]], vocab_size)
    read = IndexedDataset(tmp_path / "p")
    wanted = [np.concatenate(texts[:2]), texts[2], np.concatenate(texts[3:])]
    assert read.lengths.tolist() == [len(w) for w in wanted]
    assert all((read.read(n, 0, len(w)) == w).all() for n, w in enumerate(wanted))
