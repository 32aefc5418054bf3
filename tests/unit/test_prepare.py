"""data.prepare: every format gives the same tokens for any number of workers; stopped, killed or failed runs resume."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.corpus_writer as writer_module
import data.encode as encode_module
import data.prepare as prepare_module
from data.indexed_dataset import IndexedDataset, index_file
from data.prepare import CorpusWriter, PrepareOptions, build_parser, main, parse_options, prepare, write_tokens
from data.sources import open_prepared
from data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TokenizerSpec,
    _training_pieces,
    train_sentencepiece,
)

ROOT = Path(__file__).resolve().parent.parent.parent
TEXTS = [f"document {n}: " + "grüße, 世界 🎉\n" * (n % 7) + "x" * (37 * n % 101) for n in range(120)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(encode_module, "BATCH_BYTES", 400)


def lines_of(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: t}) + "\n" for t in texts).encode()


def zstd(data: bytes) -> bytes:
    """Two frames, as `cat a.zst b.zst` makes them."""
    half = len(data) // 2
    return b"".join(bytes(pa.compress(part, codec="zstd", asbytes=True)) for part in (data[:half], data[half:]))


def corpus_in(folder: Path) -> Path:
    """TEXTS over every format, 20 a file in the order of names; then 20 files of text."""
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines_of(TEXTS[:20]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS[20:30])) + gzip.compress(lines_of(TEXTS[30:40])))
    (folder / "c.jsonl.zst").write_bytes(zstd(lines_of(TEXTS[40:60])))
    pq.write_table(pa.table({"text": TEXTS[60:80], "n": range(20)}), folder / "d.parquet", row_group_size=7)
    pq.write_table(pa.table({"text": pa.array(TEXTS[80:100], pa.large_string())}), folder / "whole")
    (folder / "e.parquet.gz").write_bytes(gzip.compress((folder / "whole").read_bytes()))
    (folder / "whole").unlink()
    for n, text in enumerate(TEXTS[100:]):
        name, data = folder / f"f{n:02d}.txt", text.encode()
        if n % 3 == 1:
            name, data = folder / f"f{n:02d}.txt.gz", gzip.compress(data)
        if n % 3 == 2:
            name, data = folder / f"f{n:02d}.txt.zst", zstd(data)
        name.write_bytes(data)
    return folder


def run(*flags: str):
    return prepare(parse_options(PrepareOptions, build_parser(), [str(f) for f in flags]))


def texts_in(prefix: Path, end: int | None = 256) -> list[str]:
    tokens, byte = IndexedDataset(prefix), ByteTokenizer()
    texts = []
    for document, length in enumerate(tokens.lengths.tolist()):
        ids = tokens.read(document, 0, length).tolist()
        if end is not None:
            assert ids[-1] == end
        texts.append(byte.decode(ids))
    return texts


def files_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


BYTE = ("--tokenizer-type", "byte", "--append-eod")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_format_gives_its_documents_in_order(tmp_path: Path, workers: int) -> None:
    corpus = corpus_in(tmp_path / "in")
    progress = run("--input", corpus, "--output-prefix", tmp_path / "out" / "p.v1", *BYTE, "--workers", workers)
    assert texts_in(tmp_path / "out" / "p.v1") == TEXTS
    assert (progress.documents, progress.bad, progress.empty) == (120, 0, 0)
    assert progress.text_bytes == sum(len(t.encode()) for t in TEXTS) == progress.tokens - 120
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["p.v1.bin", "p.v1.idx", "p.v1.json"]


def test_without_eod_documents_are_the_text_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["one", "", "two"]))
    progress = run(
        *("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p"),
        *("--tokenizer-type", "byte", "--workers", 0, "--no-append-eod"),
    )
    assert texts_in(tmp_path / "p", end=None) == ["one", "two"] and progress.empty == 1
    assert IndexedDataset(tmp_path / "p").lengths.tolist() == [3, 3]


@pytest.mark.parametrize(
    "words",
    [
        ["--input", "a.jsonl", "--output-prefix", "p", *BYTE, "--input", "b.jsonl"],
        ["train-tokenizer", "--input", "a.jsonl", "--output", "m", "--vocab-size", "300", "--input=b.jsonl"],
    ],
)
def test_a_list_that_is_given_twice_is_refused(words: list[str], capsys) -> None:
    assert main(words) == 2 and "is given 2 times; give it once, with all its values" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "token"), [((), 256), (("--append-eod",), 256), (("--no-append-eod",), None)])
def test_a_corpus_says_how_its_documents_end(tmp_path: Path, capsys, flags: tuple[str, ...], token: int | None) -> None:
    """By default as text that train.py reads: each document ends with EOD."""
    (tmp_path / "a.jsonl").write_bytes(lines_of(["one", "two"]))
    words = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "p"), "--tokenizer-type", "byte"]
    assert main([*words, "--workers", "0", *flags]) == 0
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "p.json").read_text())["end_of_document_token"] == token
    assert texts_in(tmp_path / "p", end=token) == ["one", "two"]
    wanted = "without an end-of-document token" if token is None else "each ends with end-of-document token 256"
    assert f"2 documents ({wanted})" in said


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 3, 10, 23])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch, after: int, workers: int) -> None:
    """Bytes written after the last saved progress are dropped."""
    corpus, flags = corpus_in(tmp_path / "in"), ("--workers", workers, "--on-error", "skip", *BYTE)
    with (corpus / "a.jsonl").open("ab") as out:
        out.write(b"broken\n")
    (corpus / "ba.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS[:5]))[:-9])  # its end is cut off
    whole = run("--input", corpus, "--output-prefix", tmp_path / "whole", *flags)
    assert whole.bad == 2 and [Path(s.split(":")[0]).name for s in whole.shown] == ["a.jsonl", "ba.jsonl.gz"]
    real, calls = CorpusWriter.add, []

    def add(self, *done) -> None:
        real(self, *done)
        calls.append(1)
        if len(calls) == after:
            self.save()
            for output in self.outputs.values():
                output.write(b"after the last save")
                output.flush()
            monkeypatch.setattr(CorpusWriter, "save", lambda self: None)
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(CorpusWriter, "add", add)
        with pytest.raises(Stop):
            run("--input", corpus, "--output-prefix", tmp_path / "p", *flags)
    monkeypatch.undo()
    assert not (tmp_path / "p.idx").exists()
    resumed = run("--input", corpus, "--output-prefix", tmp_path / "p", *flags)
    assert files_of(tmp_path / "p") == files_of(tmp_path / "whole")
    assert (resumed.documents, resumed.bad, resumed.shown, resumed.text_bytes) == (
        whole.documents,
        whole.bad,
        whole.shown,
        whole.text_bytes,
    )


@pytest.mark.parametrize("place", ["add", "write_tokens"])
def test_a_run_interrupted_at_any_line_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch, place: str) -> None:
    """Ctrl-C comes at any line: of writing and counting a task, and of the loop around it."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines_of(TEXTS[:5]) + b"broken\n" + lines_of(["", *TEXTS[5:8]]))
    flags = ("--input", file, *BYTE, "--workers", 0, "--on-error", "skip")
    whole, code = (
        run(*flags, "--output-prefix", tmp_path / "whole"),
        {"add": CorpusWriter.add, "write_tokens": write_tokens}[place].__code__,
    )
    left = 0

    def in_the_loop(frame) -> bool:
        return place == "add" or frame.f_locals.get("batch") is not None

    def count(frame, event: str, _):
        nonlocal left
        if event == "line" and in_the_loop(frame):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return count

    monkeypatch.setattr(prepare_module, "SAVE_EVERY", 0.0)
    interrupted = 0
    for at in range(1, 1000):
        prefix, left = tmp_path / f"p{at}", at
        before = sys.gettrace()
        sys.settrace(lambda frame, *_: count if frame.f_code is code else None)
        try:
            run(*flags, "--output-prefix", prefix)
            break
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
        if not index_file(prefix).exists():
            assert run(*flags, "--output-prefix", prefix) == whole
        assert files_of(prefix) == files_of(tmp_path / "whole")
    assert interrupted > 30


def test_a_killed_run_leaves_no_worker_and_resumes(tmp_path: Path) -> None:
    corpus = corpus_in(tmp_path / "in")
    flags = ["--input", str(corpus), "--output-prefix", str(tmp_path / "p"), *BYTE, "--workers", "2"]
    code = textwrap.dedent(f"""
        import multiprocessing, os, sys, data.encode, data.prepare as p
        data.encode.BATCH_BYTES, p.SAVE_EVERY, real, n = 400, 0.0, p.CorpusWriter.add, []
        def add(self, *a):
            real(self, *a); n.append(1)
            if len(n) == 8:
                print(*[c.pid for c in multiprocessing.active_children()], flush=True)
                os.kill(os.getpid(), 9)
        p.CorpusWriter.add = add
        p.main({flags!r})
    """)
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in killed.stdout.split()]
    assert len(workers) == 2 and not (tmp_path / "p.idx").exists()
    deadline = time.monotonic() + 10
    while any(_lives(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.1)
    assert json.loads((tmp_path / "p.part" / "progress.json").read_text())["progress"]["documents"] > 0
    assert main(flags) == 0
    assert texts_in(tmp_path / "p") == TEXTS


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_dead_worker_ends_the_run_at_once(tmp_path: Path, monkeypatch) -> None:
    def die(self, task) -> None:
        os._exit(3)

    monkeypatch.setattr(encode_module.Encoder, "__call__", die)  # the workers are forked
    start = time.monotonic()
    with pytest.raises(ValueError, match="a worker died"):
        run("--input", corpus_in(tmp_path / "in"), "--output-prefix", tmp_path / "p", *BYTE, "--workers", 2)
    assert time.monotonic() - start < 10


BAD = [
    (b"{broken", "not a JSON record"),
    (b'{"txt": "x"}', "no text under the key"),
    (b'{"text": 5}', "no text under the key"),
    (b'["x"]', "no text under the key"),
    (b'{"text": "\xff\xfe"}', "not a JSON record in UTF-8"),
    (b'{"text": "\\ud800"}', "half a surrogate"),
]


@pytest.mark.parametrize(("line", "why"), BAD)
def test_a_bad_record_stops_the_run_with_file_and_line(tmp_path: Path, capsys, line: bytes, why: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["one"]) + b"\n" + line + b"\n" + lines_of(["two"]))
    assert (
        main(["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "p"), *BYTE, "--workers", "1"])
        == 2
    )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("data.prepare: ") and "a.jsonl:3 " in said and why in said
    assert not (tmp_path / "p.idx").exists()


def test_a_run_stopped_by_a_bad_record_resumes_with_skip(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS[:60]) + b"broken\n" + lines_of(TEXTS[60:]))
    flags = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "p"), *BYTE, "--workers", "1"]
    assert main(flags) == 2
    assert json.loads((tmp_path / "p.part" / "progress.json").read_text())["progress"]["documents"] > 20
    assert main([*flags, "--on-error", "skip"]) == 0 and texts_in(tmp_path / "p") == TEXTS


def test_bad_records_are_counted_and_the_first_shown(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(line + b"\n" + lines_of([str(n)]) for n, (line, _) in enumerate(BAD)))
    pq.write_table(pa.table({"text": ["p0", None, "p2"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no such thing")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "e.parquet")
    flags = ["--input", str(tmp_path / "*.*"), "--output-prefix", str(tmp_path / "out" / "p"), *BYTE, "--workers", "1"]
    assert main([*flags, "--on-error", "skip"]) == 0
    out = capsys.readouterr().out
    assert "8 documents" in out and "10 bad records" in out
    assert out.count("left out: ") == 5 and "a.jsonl:1 " in out and "a.jsonl:9 " in out
    facts = json.loads((tmp_path / "out" / "p.json").read_text())
    assert facts["bad_records"] == 10 and len(facts["first_bad_records"]) == 5
    assert texts_in(tmp_path / "out" / "p") == [*"012345", "p0", "p2"]


@pytest.mark.parametrize(
    ("name", "why"), [("b.parquet", ":2 has no text"), ("e.parquet", "no column 'text', but body")]
)
def test_bad_parquet_is_named(tmp_path: Path, capsys, name: str, why: str) -> None:
    column = "text" if name == "b.parquet" else "body"
    pq.write_table(pa.table({column: ["p0", None]}), tmp_path / name)
    assert main(["--input", str(tmp_path / name), "--output-prefix", str(tmp_path / "p"), *BYTE, "--workers", "0"]) == 2
    assert f"{name}{why}" in capsys.readouterr().err.replace(f"{name} has", f"{name}has").replace(
        "has no column", "no column"
    )


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_that_ends_early_is_an_error(tmp_path: Path, capsys, name: str) -> None:
    data = lines_of(TEXTS * 20)
    packed = gzip.compress(data) if name.endswith("gz") else bytes(pa.compress(data, codec="zstd", asbytes=True))
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    assert main(["--input", str(tmp_path / name), "--output-prefix", str(tmp_path / "p"), *BYTE, "--workers", "1"]) == 2
    assert "cannot be read on" in capsys.readouterr().err


def test_a_finished_corpus_is_not_overwritten(tmp_path: Path, capsys) -> None:
    corpus = corpus_in(tmp_path / "in")
    flags = ["--input", str(corpus), "--output-prefix", str(tmp_path / "p"), *BYTE, "--workers", "0"]
    assert main(flags) == 0
    before = files_of(tmp_path / "p")
    assert main(flags) == 2 and "--overwrite" in capsys.readouterr().err
    (corpus / "a.jsonl").write_bytes(lines_of(["another"]))
    assert main([*flags, "--overwrite"]) == 0 and files_of(tmp_path / "p") != before
    assert texts_in(tmp_path / "p") == ["another", *TEXTS[20:]]


def test_a_corpus_begun_from_other_inputs_is_not_resumed(tmp_path: Path, monkeypatch, capsys) -> None:
    corpus = corpus_in(tmp_path / "in")
    flags = ["--input", str(corpus), "--output-prefix", str(tmp_path / "p"), *BYTE, "--workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(flags) == 130
    (corpus / "a.jsonl").write_bytes(lines_of(["another"]))
    capsys.readouterr()
    assert main(flags) == 2 and "begun from other inputs" in capsys.readouterr().err
    assert main([*flags, "--overwrite"]) == 0 and texts_in(tmp_path / "p")[0] == "another"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    flags = ["--input", str(corpus_in(tmp_path / "in")), "--output-prefix", str(tmp_path / "p"), *BYTE]
    first = CorpusWriter(tmp_path / "p", dtype=np.dtype(np.uint16), key="k", overwrite=False)
    command = [sys.executable, "-m", "data.prepare", *flags]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 2 and "another process is writing it" in second.stderr
    first.close()
    assert main(flags) == 0


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("at", range(6))
def test_killed_between_any_two_renames_it_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch, at: int, overwrite: bool
) -> None:
    corpus, model = corpus_in(tmp_path / "in"), tmp_path / "spm.model"
    model.write_bytes(train_sentencepiece(TEXTS, vocab_size=400))
    flags = ["--input", str(corpus), "--tokenizer-model", str(model), "--workers", "0", "--output-prefix"]
    assert main([*flags, str(tmp_path / "whole")]) == 0
    prefix = tmp_path / "p"
    if overwrite:
        assert main(["--input", str(corpus / "a.jsonl"), *BYTE, "--workers", "0", "--output-prefix", str(prefix)]) == 0
        flags.insert(0, "--overwrite")
    real, calls = os.replace, []

    def replace(source, target) -> None:
        if "progress.json" not in str(target):
            calls.append(1)
            if len(calls) > at:
                raise Stop
        real(source, target)

    def remove(*_) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(writer_module.shutil, "rmtree", remove)
        with pytest.raises(Stop):
            main([*flags, str(prefix)])
    if index_file(prefix).exists() and not overwrite:  # the last rename was done
        assert files_of(prefix) == files_of(tmp_path / "whole")
        assert main([*flags, str(prefix)]) == 2
        flags.insert(0, "--overwrite")
    assert main([*flags, str(prefix)]) == 0
    assert files_of(prefix) == files_of(tmp_path / "whole") and open_prepared(prefix).tokenizer() is not None
    assert not (tmp_path / "p.part").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input", "no/such/*.jsonl", *BYTE], "no/such/*.jsonl"),
        (["--input", ".", "--tokenizer-type", "sentencepiece"], "sentencepiece needs --tokenizer-model"),
        (["--input", ".", *BYTE, "--tokenizer-model", "x"], "takes no model"),
        (["--input", ".", *BYTE, "--workers", "-1"], "--workers -1"),
        (["--input", ".", *BYTE, "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, capsys, flags: list[str], words: str) -> None:
    assert main([*flags, "--output-prefix", str(tmp_path / "p")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_inputs_without_a_document_leave_nothing(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["", ""]))
    assert main(["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "p"), *BYTE]) == 2
    assert "no document in it (2 empty" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


# ---------------------------------------------------------------------------------------------------
# Tokenizers


def hugging_face(path: Path, special: list[str]) -> Path:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(8)  # what files made for short texts say
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_json_returns_the_text_and_ends_documents(tmp_path: Path) -> None:
    tokenizer = TokenizerSpec("auto", str(hugging_face(tmp_path / "tokenizer.json", ["<pad>", "<|endoftext|>"]))).load()
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.eod == 1
    for text in TEXTS[:30]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids.max() < tokenizer.vocab_size and ids.dtype == np.int32
    assert [a.tolist() for a in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(t).tolist() for t in TEXTS]


@pytest.mark.parametrize("special", [True, False])
def test_a_text_that_quotes_the_end_does_not_end(tmp_path: Path, special: bool) -> None:
    """Papers and code about language models hold these characters; as one id they would cut a document in two."""
    file = hugging_face(tmp_path / "tokenizer.json", ["<pad>", "<|endoftext|>"])
    said = json.loads(file.read_text())
    for token in said["added_tokens"]:
        token["special"] = special or token["content"] != "<|endoftext|>"
    file.write_text(json.dumps(said))
    tokenizer = TokenizerSpec("auto", str(file)).load()
    text = "before <|endoftext|> after <pad>"
    for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0]):
        assert tokenizer.eod not in ids and 0 not in ids and tokenizer.decode(ids) == text


def test_a_tokenizer_json_without_a_usual_end_needs_its_name(tmp_path: Path) -> None:
    file = str(hugging_face(tmp_path / "tokenizer.json", ["<stop>"]))
    with pytest.raises(ValueError, match="--tokenizer-eod"):
        TokenizerSpec("auto", file).load()
    with pytest.raises(ValueError, match="no token <other>"):
        TokenizerSpec("huggingface", file, "<other>").load()
    assert TokenizerSpec("auto", file, "<stop>").load().eod == 0
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a Hugging Face tokenizer\.json"):
        TokenizerSpec("auto", str(tmp_path / "bad.json")).load()


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_corpus_knows_its_tokenizer(tmp_path: Path, kind: str) -> None:
    if kind == "huggingface":
        model = hugging_face(tmp_path / "tokenizer.json", ["<stop>"])
        flags = ["--tokenizer-eod", "<stop>"]
    else:
        model, flags = tmp_path / "spm.model", []
        model.write_bytes(train_sentencepiece(TEXTS, vocab_size=400))
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    out = tmp_path / "out" / "p"
    run("--input", tmp_path / "a.jsonl", "--output-prefix", out, "--append-eod", "--tokenizer-model", model, *flags)
    model.unlink()
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere") / "p"
    corpus = open_prepared(moved)
    tokenizer = corpus.tokenizer()
    assert tokenizer is not None
    first = corpus.tokens.read(0, 0, int(corpus.tokens.lengths[0]))
    assert tokenizer.decode(first[:-1]) == TEXTS[0] and first[-1] == tokenizer.eod
    copy = next(p for p in moved.parent.iterdir() if ".tokenizer." in p.name)
    if kind == "huggingface":
        copy.write_bytes(hugging_face(tmp_path / "o.json", ["<stop>", "<a>"]).read_bytes())
    else:
        copy.write_bytes(train_sentencepiece(TEXTS, vocab_size=390))
    with pytest.raises(ValueError, match="not the tokenizer"):
        open_prepared(moved).tokenizer()


def test_batches_are_encoded_as_single_texts(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(train_sentencepiece(TEXTS, vocab_size=400))
    tokenizer = SentencePieceTokenizer(tmp_path / "m.model")
    for texts in (TEXTS, ["with \u2581 in it", "and without"], []):
        assert [a.tolist() for a in tokenizer.encode_batch(texts)] == [tokenizer.encode(t).tolist() for t in texts]


def test_train_tokenizer(tmp_path: Path, capsys) -> None:
    corpus, model = corpus_in(tmp_path / "in"), tmp_path / "m.model"
    flags = ["train-tokenizer", "--input", str(corpus), "--output", str(model), "--vocab-size", "400"]
    assert main(flags) == 0 and SentencePieceTokenizer(model).vocab_size == 400
    assert main(flags) == 2 and "exists already" in capsys.readouterr().err
    assert main([*flags[:-1], "100000", "--output", str(tmp_path / "n.model")]) == 2
    assert "--vocab-size 100000" in capsys.readouterr().err and not (tmp_path / "n.model").exists()
    with (corpus / "a.jsonl").open("ab") as out:
        out.write(b"broken\n")
    flags[4] = str(tmp_path / "skipped.model")
    assert main(flags) == 2 and "--input: " in capsys.readouterr().err
    assert main([*flags, "--on-error", "skip"]) == 0
    out = capsys.readouterr().out
    assert "1 bad records" in out and "a.jsonl:21 is not a JSON record" in out
    assert (
        main([*flags, "--input-sentence-size", "100"]) == 2 and "--input-sentence-size 100" in capsys.readouterr().err
    )


@pytest.mark.parametrize("between", [" ", ""])
def test_a_corpus_of_one_long_line_trains(tmp_path: Path, between: str) -> None:
    """SentencePiece silently leaves out pieces longer than a MiB."""
    words = np.random.default_rng(0).choice(["ring", "of", "ranks", "turns", "once", "世界"], 400_000).tolist()
    (tmp_path / "a.jsonl").write_bytes(lines_of([between.join(words)]))
    flags = [
        "train-tokenizer",
        "--input",
        str(tmp_path / "a.jsonl"),
        "--output",
        str(tmp_path / "m.model"),
        "--vocab-size",
        "290",
    ]
    assert main(flags) == 0
    sign = "\u2581" if between else ""
    assert SentencePieceTokenizer(tmp_path / "m.model").processor.piece_to_id(f"{sign}ranks"[:6]) != 0


def test_a_line_is_cut_before_its_spaces() -> None:
    text = "\n".join(" ".join(f"word{n * k % 1013}" for n in range(k * 100)) for k in range(12))
    pieces = list(_training_pieces([text, "x" * 25_000, "short"]))
    assert "".join(pieces) == text + "x" * 25_000 + "short" and max(map(len, pieces)) <= 11_000
    assert all(
        piece[0] == " " or before[-1] == "\n"
        for before, piece in itertools.pairwise(pieces)
        if "word" in before + piece and "x" not in piece
    )


def test_a_sample_bounds_what_is_trained_on(tmp_path: Path) -> None:
    texts = [f"document {n} of {n * 7919 % 997}, " * 40 for n in range(300)]
    few = [train_sentencepiece(texts, vocab_size=300, input_sentence_size=150) for _ in range(2)]
    assert few[0] == few[1]

    def pieces(model: bytes) -> list[str]:
        (tmp_path / "m.model").write_bytes(model)
        processor = SentencePieceTokenizer(tmp_path / "m.model").processor
        return [processor.id_to_piece(i) for i in range(300)]

    assert pieces(train_sentencepiece(texts, vocab_size=300)) == pieces(
        train_sentencepiece(texts, vocab_size=300, input_sentence_size=5000)
    )
