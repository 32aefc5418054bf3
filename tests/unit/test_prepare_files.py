"""Files that data.prepare reads and writes: inputs are never overwritten; unfinished corpora resume or start over;
links are followed.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.corpus_writer as writer_module
import data.encode as encode_module
from data.corpus_writer import Progress
from data.indexed_dataset import write_indexed_dataset
from data.prepare import InputOptions, find_inputs, main
from data.readers import FileOffset
from data.sources import open_text
from data.tokenizer import train_sentencepiece
from tests.unit.test_prepare import BYTE, TEXTS, files_of, lines_of, run, texts_in, zstd
from utils.files import build_once


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(capsys, *flags: object) -> str:
    capsys.readouterr()
    assert main([str(f) for f in flags]) == 2
    said = capsys.readouterr().err.rpartition("\r")[2]  # the progress bar stands before
    assert said.count("data.prepare: ") == 1 and "Traceback" not in said and said.endswith("\n")
    return said


# ---------------------------------------------------------------------------------------------------
# Existing files


@pytest.mark.parametrize(
    ("name", "prefix"), [("web.json", "web"), ("doc.bin", "doc"), ("doc.idx", "doc"), ("p.part/a.jsonl", "p")]
)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_input_is_never_written_over(
    tmp_path: Path, capsys, monkeypatch, name: str, prefix: str, overwrite: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(lines_of(["one", "two"]))
    before = contents(tmp_path)
    # Another spelling of the same place.
    said = refused(
        capsys, "--input", tmp_path / name, "--output-prefix", f"../{tmp_path.name}/{prefix}", *BYTE, *overwrite
    )
    assert "would write over --input" in said and name in said and contents(tmp_path) == before
    if "/" not in name:
        assert "would write over" in refused(
            capsys, "--input", "./*.*", "--output-prefix", prefix, "--format", "text", *BYTE, *overwrite
        )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("linked", [False, True])
def test_the_tokenizer_is_not_written_over(tmp_path: Path, capsys, linked: bool) -> None:
    model = tmp_path / "p.tokenizer.model"
    model.write_bytes(train_sentencepiece(TEXTS, vocab_size=300))
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    if linked:
        (tmp_path / "link.model").symlink_to(model)
    flags = ("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p", "--tokenizer-model")
    assert "would write over --tokenizer-model" in refused(
        capsys, *flags, tmp_path / "link.model" if linked else model, "--overwrite"
    )


@pytest.mark.parametrize("name", ["p.json", "p.bin", "p.idx", "p.tokenizer.model"])
def test_user_files_are_replaced_only_with_overwrite(tmp_path: Path, capsys, name: str) -> None:
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(TEXTS, vocab_size=300))
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    (tmp_path / name).write_text('{"my": "notes"}')
    before = contents(tmp_path)
    flags = (
        "--input",
        tmp_path / "a.jsonl",
        "--output-prefix",
        tmp_path / "p",
        "--tokenizer-model",
        tmp_path / "spm.model",
        "--workers",
        0,
    )
    assert f"{name} exists already" in refused(capsys, *flags) and contents(tmp_path) == before
    run(*flags, "--overwrite")
    assert (tmp_path / name).read_bytes() != before[name]


@pytest.mark.parametrize("prefix", ["out/", "out/.", ".", "..", "", "out/.."])
def test_a_folder_is_no_prefix(tmp_path: Path, capsys, monkeypatch, prefix: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(lines_of(["one"]))
    (tmp_path / "out").mkdir()
    assert "is a folder" in refused(capsys, "--input", "a.jsonl", "--output-prefix", prefix, *BYTE)
    assert list(contents(tmp_path)) == ["a.jsonl"]


# ---------------------------------------------------------------------------------------------------
# Resume or start over


def begun(folder: Path, prefix: Path, *flags: object) -> tuple:
    """An unfinished corpus; returns the flags that resume it."""
    (folder / "a.jsonl").write_bytes(lines_of(TEXTS[:60]) + b"broken\n" + lines_of(TEXTS[60:]))
    flags = ("--input", folder / "a.jsonl", "--output-prefix", prefix, *(flags or BYTE), "--workers", 0)
    assert main([str(f) for f in flags]) == 2
    assert json.loads(Path(f"{prefix}.part/progress.json").read_text())["progress"]["documents"] > 20
    return (*flags, "--on-error", "skip")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(encode_module, "BATCH_BYTES", 400)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("progress.json", b""),
        ("progress.json", b"{}"),
        ("progress.json", b"[1]"),
        ("progress.json", b'{"key": "'),
        ("progress.json", b"\xff\xfe"),
        ("progress.json", b'{"key": "k", "progress": {"no such": 1}}'),
        ("progress.json", None),  # cut in half
        ("tokens", b"ab"),
        ("lengths", b""),
    ],
)
def test_corrupted_progress_is_named_and_overwritten(tmp_path: Path, capsys, name: str, content: bytes | None) -> None:
    flags = begun(tmp_path, tmp_path / "p")
    file = tmp_path / "p.part" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    said = refused(capsys, *flags)
    assert f"p.part/{name}" in said and "--overwrite starts over" in said
    run(*flags, "--overwrite")
    assert texts_in(tmp_path / "p") == TEXTS


@pytest.mark.parametrize("change", ["tokenizer", "append_eod", "json_key", "contents", "mtime", "format"])
def test_a_corpus_begun_with_other_options_is_not_resumed(tmp_path: Path, capsys, change: str) -> None:
    """Each of these would make a corpus whose first half is another's."""
    for name, size in (("m.model", 300), ("n.model", 310)):
        (tmp_path / name).write_bytes(train_sentencepiece(TEXTS, vocab_size=size))
    flags = begun(tmp_path, tmp_path / "p", "--tokenizer-model", tmp_path / "m.model", "--append-eod")
    if change == "tokenizer":
        flags = tuple(tmp_path / "n.model" if f == tmp_path / "m.model" else f for f in flags)
    elif change == "append_eod":
        flags = (*flags, "--no-append-eod")
    elif change == "json_key":
        flags += ("--json-key", "body")
    elif change == "format":
        flags += ("--format", "text")
    elif change == "contents":
        with (tmp_path / "a.jsonl").open("ab") as out:
            out.write(b"\n")
    else:
        os.utime(tmp_path / "a.jsonl", (1, 1))
    assert "begun from other inputs or flags" in refused(capsys, *flags)


def test_resuming_ignores_the_spelling_of_inputs(tmp_path: Path, monkeypatch) -> None:
    flags = begun(tmp_path, tmp_path / "p")
    monkeypatch.chdir(tmp_path)
    resumed = []
    monkeypatch.setattr(writer_module, "Progress", lambda **said: resumed.append(said) or Progress(**said))
    run("--input", "./*.jsonl", "a.jsonl", *flags[2:])
    assert resumed[0]["documents"] > 20 and texts_in(tmp_path / "p") == TEXTS


# ---------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("pattern", ["", "*", "**"])
def test_outputs_in_a_folder_of_inputs_are_no_inputs(tmp_path: Path, monkeypatch, pattern: str) -> None:
    """In a stopped, a resumed and a repeated run."""
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(TEXTS, vocab_size=300))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "p.jsonl").write_bytes(lines_of(TEXTS))  # a name that only begins as the output's do
    flags = (
        "--input",
        folder / pattern,
        "--output-prefix",
        folder / "p",
        "--tokenizer-model",
        tmp_path / "spm.model",
        "--workers",
        0,
    )
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([str(f) for f in flags]) == 130
    whole = run(*flags)
    first = files_of(folder / "p")
    assert whole.documents == len(TEXTS)
    assert main(["stats", str(folder / "p"), "--seq-length", "16"]) == 0 and (folder / "p.lengths.png").exists()
    assert run(*flags, "--overwrite") == whole and files_of(folder / "p") == first
    assert json.loads((folder / "p.json").read_text())["inputs"] == [str(folder / "p.jsonl")]


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    real, folder = tmp_path / "elsewhere", tmp_path / "in"
    (real / "deep").mkdir(parents=True)
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "z.txt").symlink_to(folder / "a.txt")
    (real / "b.txt").write_text("b")
    (real / "deep" / "c.txt").write_text("c")
    (folder / "linked").symlink_to(real)
    (folder / "again").symlink_to(real)
    (real / "deep" / "up").symlink_to(folder)  # a loop
    run(
        "--input",
        folder,
        tmp_path / "in" / ".." / "in" / "*.txt",
        "--output-prefix",
        tmp_path / "p",
        *BYTE,
        "--workers",
        0,
    )
    assert sorted(texts_in(tmp_path / "p")) == ["a", "b", "c"]
    assert sorted(open_text(str(folder), "text").texts()) == ["a", "b", "c"]


def test_a_run_of_empty_rows_is_several_tasks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([None] * 3000 + ["end"], pa.string())}), tmp_path / "a.parquet")
    source = find_inputs(InputOptions(input=(str(tmp_path / "a.parquet"),)))
    tasks = list(encode_module.read_record_batches(source, 0, FileOffset(), skip_bad=True))
    assert max(len(t.records) for t in tasks) <= 400 / 100 + 1 and sum(len(t.records) for t in tasks) == 3001


def test_documents_without_a_token_are_refused_in_one_line(tmp_path: Path, capsys) -> None:
    """A tokenizer.json may strip what a text consists of."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eod>": 0, "a": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eod>"])
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_bytes(lines_of([" ", "\n"]))
    said = refused(
        capsys,
        "--input",
        tmp_path / "a.jsonl",
        "--output-prefix",
        tmp_path / "p",
        "--tokenizer-model",
        tmp_path / "t.json",
        "--workers",
        0,
    )
    assert "no token in its 2 documents" in said and not (tmp_path / "p.part").exists()


def test_a_corpus_of_megatron_is_replaced_only_with_overwrite(tmp_path: Path, capsys) -> None:
    write_indexed_dataset(tmp_path / "p", [np.arange(5)], vocab_size=100)
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines_of(TEXTS)))
    before = files_of(tmp_path / "p")
    flags = ("--input", tmp_path / "a.jsonl.zst", "--output-prefix", tmp_path / "p", *BYTE, "--workers", 0)
    assert "--overwrite" in refused(capsys, *flags) and files_of(tmp_path / "p") == before
    run(*flags, "--overwrite")
    assert texts_in(tmp_path / "p") == TEXTS


# ---------------------------------------------------------------------------------------------------
# A full disk is named


class Full:
    """A file on a full disk: the system names none for a write."""

    def __init__(self, file) -> None:
        self.file = file

    def write(self, content) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_a_full_disk_is_named_by_prepare(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    real = writer_module.open_regular
    monkeypatch.setattr(writer_module, "open_regular", lambda path, *rest, **more: Full(real(path, *rest, **more)))
    said = refused(capsys, "--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p", *BYTE, "--workers", 0)
    assert "No space left on device" in said and f"{tmp_path}/p.part" in said


def test_a_full_disk_is_named_by_the_cache(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        build_once(tmp_path / "tokens" / "key", build)
    assert caught.value.filename == str(tmp_path / "tokens" / "key")
