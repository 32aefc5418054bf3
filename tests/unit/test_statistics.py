"""Statistics of a corpus: `python -m data.prepare stats P`."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

import data.statistics as statistics_module
from data.indexed_dataset import HEADER, IndexedDataset, index_file, write_indexed_dataset
from data.prepare import main
from data.statistics import count_duplicates, length_histogram, padding_shares
from tests.unit.test_packed_rows import dataset
from tests.unit.test_prepare import BYTE, TEXTS, lines_of, run


def test_stats_count_what_is_there(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        lines_of(["abc", "abcd" * 10, "abc", "x" * 300, "abc"])
    )  # and none that is only as long as another
    run("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p", *BYTE)
    assert main(["stats", str(tmp_path / "p"), "--seq-length", "64", "--json", str(tmp_path / "s.json")]) == 0
    out = capsys.readouterr().out
    assert "5 documents, 354 tokens" in out and "2 repeat an earlier one" in out and "256 to 511" in out
    facts = json.loads((tmp_path / "s.json").read_text())
    assert facts["duplicates"] == count_duplicates(IndexedDataset(tmp_path / "p")) == 2
    assert sum(facts["histogram"]["documents"]) == 5 and sum(facts["histogram"]["tokens"]) == 354
    assert (tmp_path / "p.lengths.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["stats", str(tmp_path / "p"), "--seq-length", "100"]) == 2 and "nearest" in capsys.readouterr().err


def test_only_what_is_the_same_token_for_token_is_a_duplicate(tmp_path: Path) -> None:
    write_indexed_dataset(
        tmp_path / "p", [np.array(ids) for ids in ([1, 2, 3], [1, 2, 4], [1, 2, 3], [], [], [3, 2, 1])], vocab_size=9
    )
    assert count_duplicates(IndexedDataset(tmp_path / "p")) == 2


@pytest.mark.parametrize("flag", ["--json", "--png"])
@pytest.mark.parametrize("suffix", [".json", ".bin", ".idx"])
def test_statistics_do_not_replace_the_corpus(tmp_path: Path, capsys, flag: str, suffix: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["abc"]))
    run("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p", *BYTE)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "link").symlink_to(tmp_path)
    assert main(["stats", str(tmp_path / "p"), flag, str(tmp_path / "link" / f"p{suffix}")]) == 2
    (tmp_path / "link").unlink()
    assert flag in capsys.readouterr().err and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_statistics_of_an_index_with_a_negative_length_are_one_line(tmp_path: Path, capsys) -> None:
    write_indexed_dataset(tmp_path / "p", [np.arange(4), np.arange(3)], vocab_size=9)
    content = bytearray(index_file(tmp_path / "p").read_bytes())
    content[HEADER.size : HEADER.size + 4] = (-5).to_bytes(4, "little", signed=True)
    index_file(tmp_path / "p").write_bytes(content)
    assert main(["stats", str(tmp_path / "p")]) == 2
    said = capsys.readouterr().err
    assert "p.idx: sequence 0 of -5 tokens" in said and said.count("\n") == 1


def test_histogram_bins_hold_their_lengths() -> None:
    edges, documents, tokens = length_histogram(np.array([1, 2, 3, 4, 7, 8]))
    assert (edges.tolist(), documents.tolist(), tokens.tolist()) == ([1, 2, 4, 8, 16], [1, 2, 2, 1], [1, 5, 11, 8])


@pytest.mark.parametrize("cp", [1, 4])
def test_padding_shares_are_those_of_the_epochs(tmp_path: Path, cp: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 300)
    shares = padding_shares(lengths, 128, cp)
    for packing, share in shares.items():
        epoch = dataset(lengths.tolist(), seq_length=128, alignment=2 * cp, packing=packing)
        assert share == pytest.approx(1 - lengths.sum() / (epoch.samples_per_epoch * 128))


def test_statistics_of_a_read_only_corpus(tmp_path: Path, capsys, monkeypatch) -> None:
    """The picture's default place is beside the corpus; the statistics are printed all the same."""
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    run("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p", *BYTE, "--workers", 0)

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(statistics_module, "replace_synced", refuse)
    capsys.readouterr()
    assert main(["stats", str(tmp_path / "p"), "--seq-length", "64"]) == 0
    said = capsys.readouterr().out
    assert "120 documents" in said and f"no picture: {tmp_path}: Permission denied; --png FILE" in said
    assert main(["stats", str(tmp_path / "p"), "--seq-length", "64", "--png", str(tmp_path / "x.png")]) == 2
    assert "x.png" in capsys.readouterr().err


def test_the_picture_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS[:5]))
    run("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p", *BYTE, "--workers", 0)
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "p.lengths.png").symlink_to(tmp_path / "mine")
    assert main(["stats", str(tmp_path / "p"), "--seq-length", "64"]) == 0
    assert (tmp_path / "mine").read_bytes() == b"mine" and (tmp_path / "p.lengths.png").read_bytes()[:4] == b"\x89PNG"
