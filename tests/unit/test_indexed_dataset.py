"""Token files of Megatron's: several sequences a document, fuzzed headers, a cost of opening that does not grow."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import PackedDataset
from data.indexed_dataset import (
    HEADER,
    MAGIC,
    IndexedDataset,
    index_file,
    token_file,
    write_index,
    write_indexed_dataset,
)
from data.packing import PackingOptions

ROOT = Path(__file__).resolve().parent.parent.parent


def write_raw(
    prefix: Path,
    tokens: np.ndarray,
    lengths: list[int],
    offsets: list[int],
    firsts: list[int],
    code: int = 8,
    modes: bytes = b"",
) -> None:
    """Files to the documented bytes, as Megatron-LM's builder lays them out."""
    token_file(prefix).write_bytes(tokens.tobytes())
    parts = [
        struct.pack(f"<{len(values)}{kind}", *values)
        for kind, values in (("i", lengths), ("q", offsets), ("q", firsts))
    ]
    index_file(prefix).write_bytes(HEADER.pack(MAGIC, 1, code, len(lengths), len(firsts)) + b"".join(parts) + modes)


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    """What `tools/preprocess_data.py --split-sentences` writes: 4 sequences in 3 documents, one of them empty."""
    write_raw(
        tmp_path / "t", np.arange(20, dtype=np.uint16), [5, 7, 3, 5], [0, 10, 24, 30], [0, 2, 2, 4], modes=bytes(4)
    )
    data = IndexedDataset(tmp_path / "t")
    assert data.lengths.tolist() == [12, 0, 8] and len(data) == 3
    assert data.read(0, 3, 9).tolist() == list(range(3, 12)) and data.read(2, 0, 8).tolist() == list(range(12, 20))
    assert data.read(1, 0, 0).tolist() == []
    packed = PackedDataset(data, np.arange(3), PackingOptions(seq_length=8, method="best-fit", seed=1), pad_token=0)
    read = np.concatenate([packed.sample(n).tokens for n in range(packed.samples_per_epoch)])
    assert {*range(20)} <= set(read.tolist())


def test_an_empty_document_at_the_very_end(tmp_path: Path) -> None:
    write_raw(tmp_path / "t", np.arange(12, dtype=np.uint16), [5, 7], [0, 10], [0, 2, 2])
    data = IndexedDataset(tmp_path / "t")
    assert data.lengths.tolist() == [12, 0] and data.read(1, 0, 0).tolist() == [] and len(data.read(0, 0, 12)) == 12


def test_sequences_that_do_not_lie_end_to_end_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "t", np.arange(30, dtype=np.uint16), [5, 7, 3], [0, 20, 40], [0, 2, 3])
    with pytest.raises(ValueError, match="document 0 do not lie end to end"):
        IndexedDataset(tmp_path / "t").read(0, 0, 12)


@pytest.mark.parametrize(
    ("lengths", "offsets", "firsts"),
    [([2, 4, 2], [0, 16, 12], [0, 3]), ([0, 4, 0], [10, 0, 18], [0, 3]), ([4, 2, 2], [0, 8, 14], [0, 1, 3])],
)
def test_no_sequence_of_a_document_lies_elsewhere(tmp_path: Path, lengths, offsets, firsts) -> None:
    write_raw(tmp_path / "t", np.arange(30, dtype=np.uint16), lengths, offsets, firsts)
    with pytest.raises(ValueError, match=f"document {len(firsts) - 2} do not lie end to end"):
        _ = IndexedDataset(tmp_path / "t").lengths


@pytest.mark.parametrize("code", [6, 7, 99])
def test_what_is_no_token_is_refused(tmp_path: Path, code: int) -> None:
    write_raw(tmp_path / "t", np.arange(8, dtype=np.uint8), [1], [0], [0, 1], code=code)
    with pytest.raises(ValueError, match="a token is a whole number"):
        IndexedDataset(tmp_path / "t")


@pytest.mark.parametrize("firsts", [[0, 1], [1, 2], [0, 5], []])
def test_document_entries_that_leave_sequences_out_are_refused(tmp_path: Path, firsts: list[int]) -> None:
    write_raw(tmp_path / "t", np.arange(8, dtype=np.uint16), [4, 4], [0, 8], firsts)
    with pytest.raises(ValueError, match="document entries"):
        IndexedDataset(tmp_path / "t")


def test_document_entries_that_run_backwards_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "t", np.arange(8, dtype=np.uint16), [4, 2, 2], [0, 8, 12], [0, 2, 1, 2, 3])
    with pytest.raises(ValueError, match="backwards"):
        _ = IndexedDataset(tmp_path / "t").lengths


@pytest.mark.parametrize(
    ("lengths", "offsets", "words"),
    [
        ([4, 4], [0, 4], "sequences overlap"),  # in order
        ([4, 4], [4, 0], "sequences overlap"),  # backwards
        ([4, 4, 2], [0, 8, 0], "sequences overlap"),
        ([4, 4], [0, 18], r"sequence 1 of 4 tokens of 2 bytes at byte 18, but t.bin holds 20 bytes"),
        ([4, 4], [-2, 8], "sequence 0 .* at byte -2"),
        ([4, 4], [0, 9], "sequence 1 .* at byte 9"),
        ([2**31 - 1, 4], [0, 0], "sequence 0 of 2147483647 tokens"),
        ([-1, 4], [0, 8], "sequence 0 of -1 tokens"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_sequences_that_overlap_or_lie_outside_are_refused(tmp_path: Path, monkeypatch, lengths, offsets, words, chunk):
    monkeypatch.setattr("data.indexed_dataset.CHUNK", chunk)
    lengths, offsets = [*lengths, 0, 1], [*offsets, -99, 16]  # empty ones may be anywhere
    if len(lengths) == 5:
        offsets[-1] = 18
    write_raw(tmp_path / "t", np.arange(10, dtype=np.uint16), lengths, offsets, [*range(len(lengths) + 1)])
    with pytest.raises(ValueError, match=words):
        _ = IndexedDataset(tmp_path / "t").lengths


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_sequences_in_any_order_and_with_gaps_are_read(tmp_path: Path, monkeypatch, chunk: int) -> None:
    """An index that leaves documents out, or shuffles them, over the same token file."""
    monkeypatch.setattr("data.indexed_dataset.CHUNK", chunk)
    write_raw(tmp_path / "t", np.arange(10, dtype=np.uint16), [3, 0, 2, 2], [14, 99, 0, 6], [0, 1, 2, 3, 4])
    data = IndexedDataset(tmp_path / "t")
    read = [data.read(n, 0, int(length)).tolist() for n, length in enumerate(data.lengths)]
    assert read == [[7, 8, 9], [], [0, 1], [3, 4]]


def test_an_index_of_a_few_bytes_asks_for_no_memory(tmp_path: Path) -> None:
    """20 documents of 2^31 - 1 tokens each would be cut into millions of pieces."""
    count, most = 20, 2**31 - 1
    lengths = [most] * (count - 1) + [1]
    write_raw(tmp_path / "t", np.arange(100, dtype=np.uint16), lengths, [0] * count, [*range(count + 1)])
    assert index_file(tmp_path / "t").stat().st_size < 500
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"t\.idx: sequence 0 of {most} tokens"):
        PackedDataset(
            IndexedDataset(tmp_path / "t"),
            np.arange(count),
            PackingOptions(seq_length=64, method="best-fit", seed=1),
            pad_token=0,
        )
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_broken_byte_makes_it_read_past_the_files(tmp_path_factory, data) -> None:
    """Cut, lengthened or changed anywhere: either an error names the fault, or reading follows the index."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_indexed_dataset(folder / "t", [np.arange(n) + 100 for n in (5, 0, 9, 2)], vocab_size=1000)
    for file in (index_file(folder / "t"), token_file(folder / "t")):
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(0, 2))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.sampled_from([0, 1, 2, 4, 10, 127, 128, 255]) | st.integers(0, 255))
        content = content[
            : data.draw(st.sampled_from([len(content)] * 9 + [len(content) - 1, len(content) - 8, len(content) // 2]))
        ]
        file.write_bytes(content + bytes(data.draw(st.sampled_from([0] * 9 + [1, 8]))))
    read: Counter = Counter()
    try:
        tokens = IndexedDataset(folder / "t")
        packed = PackedDataset(
            tokens,
            np.arange(len(tokens)),
            PackingOptions(seq_length=8, method="greedy", seed=1),
            pad_token=0,
            vocab_size=70000,
        )
        for n in range(min(50, packed.samples_per_epoch)):
            s = packed.sample(n)
            read.update(s.tokens[np.repeat(s.lengths > 0, s.padded_lengths)].tolist())
        documents = [tokens.read(d, 0, int(length)).tolist() for d, length in enumerate(tokens.lengths)]
    except (ValueError, MemoryError) as error:
        assert isinstance(error, MemoryError) or "t.idx" in str(error) or "t.bin" in str(error)
        return
    wanted = documents_by_the_format(index_file(folder / "t").read_bytes(), token_file(folder / "t").read_bytes())
    assert documents == wanted
    if packed.samples_per_epoch <= 50:
        assert read == Counter(token for document in wanted for token in document)


def documents_by_the_format(index: bytes, tokens: bytes) -> list[list[int]]:
    """What the documented bytes say, read without any of our code."""
    _, _, code, sequences, entries = struct.unpack_from("<9sQBQQ", index)
    kind = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    offsets = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    firsts = struct.unpack_from(f"<{entries}q", index, 34 + 12 * sequences)
    found = []
    for first, last in itertools.pairwise(firsts):
        found.append(
            [
                token
                for s in range(first, last)
                if lengths[s]
                for token in struct.unpack_from(f"<{lengths[s]}{kind}", tokens, offsets[s])
            ]
        )
    return found


def test_random_reads_bring_no_more_into_memory_than_they_ask_for(tmp_path: Path) -> None:
    """Without readahead; a prefetch brings a long document in by itself."""
    write_indexed_dataset(tmp_path / "a", [np.arange(2000)] * 4000, vocab_size=100)  # 16 MB
    held = {}
    for is_random in (False, True):
        with token_file(tmp_path / "a").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        data = IndexedDataset(tmp_path / "a")
        assert len(data.lengths) == 4000
        if is_random:
            data.expect_random_reads()
            data = pickle.loads(pickle.dumps(data))  # as in a worker process
        for document in range(0, 4000, 100):
            assert data.read(document, 3, 5).tolist() == [3, 4, 5, 6, 7]
        held[is_random] = count_resident(token_file(tmp_path / "a"))
        data.prefetch(data.locate(50, 0, 2000), 2000)
        assert data.read(50, 0, 2000).tolist() == list(range(2000))
        del data
    if held[False] < 1 << 20:
        pytest.skip("this file system reads nothing ahead, or keeps no pages")
    assert held[True] <= 40 * 2 * 4096


def count_resident(path: Path) -> int:
    """Bytes of a file in the page cache, by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // 4096))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
        return 4096 * sum(page & 1 for page in pages)


def test_a_checked_index_is_not_checked_again(tmp_path: Path, monkeypatch) -> None:
    """A worker process, and a rank that finds the check in the cache, read no more of the index than they use."""
    write_indexed_dataset(tmp_path / "a", [np.arange(5)] * 3, vocab_size=100)
    data = IndexedDataset(tmp_path / "a")
    assert not data.is_checked and data.lengths.tolist() == [5, 5, 5] and data.is_checked
    monkeypatch.setattr(IndexedDataset, "_check_sequences", lambda self: pytest.fail("checked again"))
    again = pickle.loads(pickle.dumps(data))
    assert again.lengths.tolist() == [5, 5, 5] and again.read(2, 1, 3).tolist() == [1, 2, 3]
    with pytest.raises(pytest.fail.Exception):
        _ = IndexedDataset(tmp_path / "a").lengths


def test_writing_an_index_takes_pieces(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.indexed_dataset.CHUNK", 3)
    lengths = np.array([5, 0, 7, 1, 2, 9, 4], np.int32)
    with (tmp_path / "a.idx").open("wb") as out:
        write_index(out, lengths, np.dtype(np.uint16))
    monkeypatch.undo()
    write_indexed_dataset(tmp_path / "b", [np.arange(n) for n in lengths], vocab_size=100)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


def test_opening_costs_the_same_for_a_hundred_million_documents(tmp_path: Path) -> None:
    """Sparse files with the header of a huge corpus: neither time nor memory grows with them."""
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from data.indexed_dataset import *
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
for count in (1000, 100_000_000):
    prefix = Path({str(tmp_path)!r}, str(count))
    with index_file(prefix).open("wb") as out:
        out.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
        out.truncate(HEADER.size + 20 * count)
        out.seek(HEADER.size + 20 * count)
        out.write(count.to_bytes(8, "little"))
    token_file(prefix).write_bytes(bytes(2))
    IndexedDataset(prefix)
    before, start = anonymous(), time.perf_counter()
    kept = [IndexedDataset(prefix) for _ in range(20)]
    print((time.perf_counter() - start) / 20, anonymous() - before, len(kept[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (small, small_kb, _), (large, large_kb, count) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert count == 100_000_000
    assert large < 10 * small + 0.01 and large_kb <= small_kb + 256
