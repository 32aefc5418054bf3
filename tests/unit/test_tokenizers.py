"""Tokenizers from elsewhere: text comes back exactly or is refused, no text ends a document, bad models are one line"""

from __future__ import annotations

import functools
import io
import itertools
import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import regex
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

import data.tokenizer as tokenizer_module
import tools.generate as generate_module
import training.sample as sample_module
from config.cli import parse_arguments
from data.build import build_tokens
from data.prepare import main
from data.sources import open_prepared, open_text
from data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerSpec,
    UnencodableText,
)
from utils.errors import UserError

WORDS = "a ring of ranks turns once and every token knows its place in the row; "
WORDS += "padding is silent, five axes make one loss. "
TEXT = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("\u2581 ab\n"), max_size=40)


def sentencepiece_bytes(**options) -> bytes:
    """A small model of `WORDS`. Text stays as it is unless `options` say something else."""
    model = io.BytesIO()
    exact = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True, vocab_size=330)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 5),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **exact | dict(model_type="bpe") | options,
    )
    return model.getvalue()


def load_model(folder: Path, content: bytes, name: str = "m.model", eod: str | None = None):
    (folder / name).write_bytes(content)
    return TokenizerSpec("auto", str(folder / name), eod).load()


# ---------------------------------------------------------------------------------------------------
# SentencePiece


@functools.cache
def exact_model(kind: str, has_prefix: bool, has_bytes: bool) -> SentencePieceTokenizer:
    content = sentencepiece_bytes(
        model_type=kind, add_dummy_prefix=has_prefix, byte_fallback=has_bytes, vocab_size=330 if has_bytes else 60
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return load_model(Path(folder), content)


@pytest.mark.parametrize("has_bytes", [True, False])
@pytest.mark.parametrize("has_prefix", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@given(text=TEXT)
@example("a\u2581b")
@example("\u2581")
@example("\u2581 b")
@example(" \u2581\u2581  b ")
@example(" a ring ")
@example("</s><unk><0x41>\x00\ufeff")
@example("e\u0301 \u2460 \ufb01 \u3000\r\n")
@settings(max_examples=60, deadline=None)
def test_text_comes_back_or_is_refused(kind: str, has_prefix: bool, has_bytes: bool, text: str) -> None:
    tokenizer = exact_model(kind, has_prefix, has_bytes)
    try:
        ids = tokenizer.encode(text)
    except UnencodableText as error:
        assert not has_bytes and "holds U+" in str(error)
        return
    assert tokenizer.decode(ids) == text and tokenizer.eod not in ids


@functools.cache
def byte_level() -> bytes:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<eod>", "<|\u4e2d|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([WORDS, "\xe9\u4e2d\U0001f600" * 9], trainer)
    return bpe.to_str().encode()


@functools.cache
def byte_fallback() -> bytes:
    """As tokenizer.json files of Llama 2: U+2581 for a space, <0xNN> for bytes without a token."""
    vocab = {token: i for i, token in enumerate(("<unk>", "</s>", "\u2581", "a", "b", "\u2581a", "\u4e2d"))}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    bpe = tokenizers.Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence(parts)
    return bpe.to_str().encode()


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram", "byte level", "byte fallback"])
@given(text=TEXT)
@example("\xe9\u4e2d\U0001f600 a<0x41> ab")
@settings(max_examples=60, deadline=None)
def test_tokens_count_the_bytes_of_a_text(tmp_path_factory, kind: str, text: str) -> None:
    if kind == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif kind.startswith("byte "):
        content = byte_level() if kind == "byte level" else byte_fallback()
        tokenizer = load_model(tmp_path_factory.getbasetemp(), content, f"{kind}.json")
    else:
        tokenizer = exact_model(kind, False, True)
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,) and sizes[tokenizer.eod] == 0
    with suppress(UnencodableText):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["word piece", "end of word", "no decoder"])
def test_tokens_of_unknown_length_count_no_bytes(tmp_path: Path, kind: str) -> None:
    if kind == "end of word":
        model = tokenizers.Tokenizer(models.BPE({"a</w>": 0, "b</w>": 1, "<eod>": 2}, [], end_of_word_suffix="</w>"))
        model.decoder = decoders.BPEDecoder()
    else:
        model = tokenizers.Tokenizer(models.WordPiece({"un": 0, "##a": 1, "[UNK]": 2, "<eod>": 3}, unk_token="[UNK]"))
        if kind == "word piece":
            model.decoder = decoders.WordPiece()
    assert load_model(tmp_path, model.to_str().encode(), "t.json").token_bytes() is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
        ({"normalization_rule_name": "nfkc_cf"}, "nfkc_cf"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_models_that_change_text_are_refused(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_model(tmp_path, sentencepiece_bytes(**options))


def test_a_model_whose_ids_changed_has_another_fingerprint(tmp_path: Path) -> None:
    """Old token files of a model with a dummy prefix hold another space after U+2581."""
    import hashlib

    for has_prefix in (True, False):
        content = sentencepiece_bytes(add_dummy_prefix=has_prefix)
        old = hashlib.sha256(content).hexdigest()[:16]
        assert (load_model(tmp_path, content).fingerprint == old) == (not has_prefix)


def test_a_document_without_pieces_is_a_bad_record(tmp_path: Path, capsys) -> None:
    model = tmp_path / "m.model"
    model.write_bytes(sentencepiece_bytes(byte_fallback=False, vocab_size=60))
    texts = ["a ring", "a \u2581 ring", "ranks \u4e2d", "one loss"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "p"), "--workers", "0"]
    flags += ["--tokenizer-model", str(model)]
    assert main(flags) == 2 and "a.jsonl:2 holds U+2581" in capsys.readouterr().err
    assert main([*flags, "--on-error", "skip"]) == 0
    out = capsys.readouterr().out
    assert "2 documents" in out and "2 bad records" in out and "a.jsonl:3 holds U+4E2D" in out
    with pytest.raises(UserError, match=r"a\.jsonl: document 2 holds U\+2581"):
        build_tokens(
            open_text(str(tmp_path / "a.jsonl"), "text"), TokenizerSpec("auto", str(model)).load(), cache_path=tmp_path
        )


def continued(tokenizer: SentencePieceTokenizer) -> tuple[list[int], str]:
    """(new ids, the text that `a ring` and they are)."""
    wanted = "a ring of ranks"
    return tokenizer.encode(wanted).tolist()[len(tokenizer.encode("a ring")) :], wanted


def sampled(tokenizer: Tokenizer, capsys, *, prompt: str | None = None) -> str:
    """The sample that train.py prints where the model says the tokenizer's id 1."""
    config = parse_arguments(["--sample-tokens", "1", *(() if prompt is None else ("--sample-prompt", prompt))])
    with mock.patch.object(sample_module, "generate", return_value=[1]):
        ranks = SimpleNamespace(watchdog=mock.Mock(), grid=None, device=None, is_writer=True)
        config.data.document_alignment = config.parallel.cp_size = config.parallel.tp_size = 1
        sample_module.TextSampler(None, tokenizer, config, ranks, []).run("now")  # type: ignore[arg-type]
    return capsys.readouterr().out.split("-----\n")[1].removesuffix("\n")


def test_a_sample_keeps_the_space_after_its_prompt(monkeypatch, capsys) -> None:
    """The first piece of the new ids begins with a space, which a model with a dummy prefix takes off."""
    tokenizer = exact_model("bpe", True, True)
    new, wanted = continued(tokenizer)
    monkeypatch.setattr(sample_module, "generate", lambda *arguments, **options: new)
    ranks = SimpleNamespace(watchdog=mock.Mock(), grid=None, device=None, is_writer=True)
    flags = ["--sample-tokens", "3", "--document-alignment", "2", "--cp-size", "1", "--tp-size", "1"]
    for prompt, text in (("a ring", wanted), ("", tokenizer.decode([*tokenizer.encode("\n"), *new]))):
        config = parse_arguments([*flags, "--sample-prompt", prompt])
        sample_module.TextSampler(None, tokenizer, config, ranks, []).run("now")  # type: ignore[arg-type]
        assert f"sample now -----\n{text}\n-----" in capsys.readouterr().out


def test_generated_text_keeps_the_space_after_its_prompt(monkeypatch, capsys) -> None:
    tokenizer = exact_model("bpe", True, True)
    new, wanted = continued(tokenizer)
    fakes: dict[str, object] = dict(find_run_checkpoint=None, read_run_metadata={"tokenizer": ""}, load_model=None)
    fakes |= dict(find_tokenizer=tokenizer, initialise_distributed=(None, None), continue_text=iter(new), dist=None)
    for name, result in fakes.items():
        monkeypatch.setattr(generate_module, name, mock.Mock(return_value=result))
    assert generate_module.main(["--load", "x", "--prompt", "a ring", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == wanted + "\n"


# ---------------------------------------------------------------------------------------------------
# The end of a document, quoted in a text


def word_level(unknown: str = "[UNK]") -> tokenizers.Tokenizer:
    words = ["</s>", "[UNK]", "a", "b"]
    made = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def word_piece() -> tokenizers.Tokenizer:
    pieces = ["[UNK]", "</s>", "a", "b", *"</s>", "##/", "##s", "##>", "##a"]
    made = tokenizers.Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -2.0) for piece in ("\u2581", *"</s>ab"))]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def bpe(ignore_merges: bool = True, merges: tuple[tuple[str, str], ...] = ()) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: n for n, piece in enumerate([*alphabet, "</s>", *("".join(pair) for pair in merges[:-1])])}
    made = tokenizers.Tokenizer(models.BPE(vocab, list(merges), ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def merged_bpe() -> tokenizers.Tokenizer:
    return bpe(ignore_merges=False, merges=(("<", "/"), ("</", "s"), ("</s", ">")))


@pytest.mark.parametrize("is_added", [True, False])
@pytest.mark.parametrize("make", [word_level, word_piece, unigram, bpe, merged_bpe])
def test_a_quoted_end_is_text(tmp_path: Path, make, is_added: bool) -> None:
    """Where the EOD stands in the model's own vocabulary, a text's `</s>` was one."""
    made = make()
    if is_added:
        made.add_special_tokens(["</s>"])
    tokenizer = load_model(tmp_path, made.to_str().encode(), "t.json")
    assert tokenizer.eod == made.token_to_id("</s>") and tokenizer.vocab_size == made.get_vocab_size()
    for text in ("</s>", "a</s>b", "a </s> b", " </s>", "</s></s>"):
        for ids in (tokenizer.encode(text), tokenizer.encode_batch([text, "a"])[0]):
            assert len(ids) and tokenizer.eod not in ids
            if make in (unigram, bpe, merged_bpe):
                assert tokenizer.decode([*ids, tokenizer.eod]) == (
                    text.strip() if make is unigram else text
                )  # Metaspace
    # Texts without the end have the ids that they had.
    made.encode_special_tokens = True
    for text in ("a b", "b<a", "/ s >"):
        assert tokenizer.encode(text).tolist() == made.encode(text, add_special_tokens=False).ids


def test_an_unknown_token_that_is_the_end_refuses_texts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="end-of-document token, id 0"):
        load_model(tmp_path, word_level("</s>").to_str().encode(), "t.json").encode("a zebra")


@pytest.mark.parametrize("option", ["user_defined_symbols", "control_symbols"])
def test_no_text_holds_a_sentencepiece_end(tmp_path: Path, option: str) -> None:
    """A user-defined `</s>` is found in texts; SentencePiece then names no end of its own, and the model is refused."""
    content = sentencepiece_bytes(model_type="unigram", **{option: ["</s>"]})
    try:
        tokenizer = load_model(tmp_path, content)
    except UserError as error:
        assert "end-of-sentence" in str(error) and option == "user_defined_symbols"
        return
    assert (
        tokenizer.eod not in tokenizer.encode("a</s> </s> </s>")
        and tokenizer.decode(tokenizer.encode("a</s>")) == "a</s>"
    )


# ---------------------------------------------------------------------------------------------------
# tokenizer.json: changed texts, expressions that never end


def trained_bpe(**parts) -> bytes:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(made, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([WORDS], trainer)
    made.add_special_tokens(["</s>"])
    return made.to_str().encode()


def test_a_tokenizer_that_changes_text_says_so(tmp_path: Path) -> None:
    assert load_model(tmp_path, trained_bpe(), "t.json").change == ""
    assert load_model(tmp_path, trained_bpe(normalizer=normalizers.NFC()), "t.json").change == ""  # as Qwen's
    assert (
        "'A b' becomes 'a b'" in load_model(tmp_path, trained_bpe(normalizer=normalizers.Lowercase()), "t.json").change
    )


def test_a_space_sign_that_becomes_a_space_is_refused(tmp_path: Path) -> None:
    """As the tokenizer.json of Llama 2 and Mistral v1 do."""
    parts = dict(
        pre_tokenizer=None,
        normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        decoder=decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    said = json.loads(trained_bpe(**parts))
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    said["model"]["byte_fallback"] = True
    for piece in pieces:
        said["model"]["vocab"][piece] = len(said["model"]["vocab"])
    del said["added_tokens"][:]
    tokenizer = load_model(tmp_path, json.dumps(said).encode(), "t.json", eod="<0x00>")
    assert tokenizer.change == "" and tokenizer.decode(tokenizer.encode(" a ring")) == " a ring"
    with pytest.raises(UnencodableText, match=r"U\+2581"):
        tokenizer.encode("a\u2581ring")


SLOW = r"a*a*a*[^a!]$"  # cubic in a run of one letter, at each of its places


def test_expressions_that_never_end_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_module, "TRIAL_SECONDS", 4.0)
    slow = trained_bpe(pre_tokenizer=pre_tokenizers.Split(Regex(SLOW), "isolated"))
    with pytest.raises(UserError, match=r"t\.json: .*(more than 4 s|cannot encode a text)"):
        load_model(tmp_path, slow, "t.json")


def test_a_closed_alphabet_is_no_fault(tmp_path: Path, capsys) -> None:
    """A model of three words, without one for the unknown, encodes none of the trial's texts."""
    closed = tokenizers.Tokenizer(models.WordLevel({"ring": 0, "rank": 1, " ": 2}))
    closed.pre_tokenizer = pre_tokenizers.Split(Regex(r" "), "isolated")
    closed.decoder = decoders.Fuse()
    closed.add_special_tokens(["</s>"])
    tokenizer = load_model(tmp_path, closed.to_str().encode(), "t.json")
    assert tokenizer.decode(tokenizer.encode("ring rank")) == "ring rank"
    with pytest.raises(UnencodableText, match="cannot be tokenized"):
        tokenizer.encode("wheel")
    assert sampled(tokenizer, capsys) == "rank"


def test_a_given_prompt_outside_the_alphabet_is_refused(capsys) -> None:
    tokenizer = exact_model("bpe", True, False)
    assert sampled(tokenizer, capsys, prompt="ring") == "ring"  # id 1, <s>, is no text
    with pytest.raises(UserError, match="--sample-prompt holds U"):
        sampled(tokenizer, capsys, prompt="\u4e2d")


def test_a_tokenizer_is_tried_once(tmp_path: Path, monkeypatch) -> None:
    """Each of sixty workers would start a child of its own."""
    calls = []
    monkeypatch.setattr(tokenizer_module.subprocess, "run", lambda *arguments, **options: calls.append(1))
    content = trained_bpe(pre_tokenizer=pre_tokenizers.Split(Regex("tried once"), "isolated"))
    for _ in range(3):
        load_model(tmp_path, content, "t.json")
    assert calls == [1]


def test_a_panic_is_one_line(tmp_path: Path, monkeypatch) -> None:
    """Rust's panics are no `Exception`; the trial meets this one, and a document may."""
    content = trained_bpe(pre_tokenizer=pre_tokenizers.Split(Regex(r"(z+)+$"), "isolated"))
    tokenizer = load_model(tmp_path, content, "t.json")  # the trial has no z
    with pytest.raises(UnencodableText, match="cannot be tokenized"):
        tokenizer.encode("z" * 50 + "!")
    assert len(tokenizer.encode("a ring"))
    for old, new in ((b"(z+)", b"(a+)"), (b'"Regex":"(z+)', b'"\\u0052egex":"(a+)')):  # the same name in JSON
        with pytest.raises(UserError, match=r"t\.json: cannot encode a text of one letter \(.*Onig"):
            load_model(tmp_path, content.replace(old, new), "t.json")
    said = json.loads(content)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a", "z" * 50 + "!", "b")))
    (tmp_path / "t.json").write_text(json.dumps(said))
    flags = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "p"), "--on-error", "skip"]
    assert main([*flags, "--workers", "1", "--tokenizer-model", str(tmp_path / "t.json")]) == 0


# ---------------------------------------------------------------------------------------------------
# vocab.json and merges.txt


def write_gpt2(folder: Path, name: str = "vocab.json") -> Path:
    """GPT-2's files, of merges learned from `WORDS`; the end of a document stands in the vocabulary, as in GPT-2's."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([WORDS, "it's 42 ranks\n\n"] * 9, vocab_size=330, min_frequency=2, show_progress=False)
    said = json.loads(made._tokenizer.to_str())["model"]
    across, count = "s\u0120", len(said["vocab"])  # "s " merges first where words are not split
    vocab = said["vocab"] | {"<|endoftext|>": count, across: count + 1}
    (folder / name).write_text(json.dumps(vocab))
    merges = [" ".join(across), *(merge if isinstance(merge, str) else " ".join(merge) for merge in said["merges"])]
    (folder / name.replace("vocab.json", "merges.txt")).write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder / name


@functools.cache
def gpt2_files() -> tuple[Tokenizer, dict[str, int], dict[tuple[str, ...], int]]:
    """(the tokenizer of the files, their vocabulary, the rank of each pair that merges)."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = write_gpt2(Path(folder))
        lines = file.with_name("merges.txt").read_text().splitlines()[1:]
        ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}
        return TokenizerSpec("auto", str(file)).load(), json.loads(file.read_text()), ranks


def encode_as_gpt2(text: str, vocab: dict[str, int], ranks: dict[tuple[str, ...], int]) -> list[int]:
    """The algorithm of GPT-2's encoder.py, written independently: split, letters of bytes, the lowest rank merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for word in regex.findall(words, text):
        parts = [letters[byte] for byte in word.encode()]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            best, at, joined = min(pairs, key=ranks.__getitem__), 0, []
            while at < len(parts):
                is_best = tuple(parts[at : at + 2]) == best
                joined.append("".join(best) if is_best else parts[at])
                at += 1 + is_best
            parts = joined
        ids += [vocab[part] for part in parts]
    return ids


@given(text=TEXT)
@example(WORDS)
@example("it's  42 ranks \n\n\t x\u00e9\u4e2d\U0001f600<|endoftext|>")
@settings(max_examples=60, deadline=None)
def test_vocabulary_and_merges_are_read_by_the_rules_of_gpt2(text: str) -> None:
    tokenizer, vocab, ranks = gpt2_files()
    ids = tokenizer.encode(text).tolist()
    assert ids == encode_as_gpt2(text, vocab, ranks)
    assert tokenizer.decode([*ids, tokenizer.eod]) == text and tokenizer.eod == vocab["<|endoftext|>"]
    sizes = tokenizer.token_bytes()
    assert sizes is not None and sizes[ids].sum() == len(text.encode())


def test_a_corpus_holds_the_whole_tokenizer_of_two_files(tmp_path: Path) -> None:
    model = write_gpt2(tmp_path, "gpt2-vocab.json")
    wanted = TokenizerSpec("auto", str(model)).load()
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": WORDS}))
    flags = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "p"), "--workers", "0"]
    assert main([*flags, "--tokenizer-model", str(model)]) == 0
    for file in (model, tmp_path / "gpt2-merges.txt"):
        file.unlink()
    found = open_prepared(tmp_path / "p").tokenizer()
    assert found is not None and found.fingerprint == wanted.fingerprint
    assert found.encode(WORDS).tolist() == wanted.encode(WORDS).tolist()


def test_a_vocabulary_without_its_rules_is_refused(tmp_path: Path) -> None:
    model = write_gpt2(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")  # Qwen's vocab.json splits words in another way
    with pytest.raises(UserError, match=r"without the rules of a tokenizer; give .*tokenizer\.json"):
        TokenizerSpec("auto", str(model)).load()
    (tmp_path / "tokenizer.json").rename(tmp_path / "added_tokens.json")  # CodeGen's: runs of spaces
    with pytest.raises(UserError, match=r"without the rules of a tokenizer; give .*tokenizer\.json"):
        TokenizerSpec("auto", str(model)).load()
    (tmp_path / "added_tokens.json").unlink()
    content = model.read_text()
    model.write_text(json.dumps(json.loads(content) | {"ring</w>": 100_000}))  # CLIP's
    with pytest.raises(UserError, match=r"without the rules of a tokenizer; give .*tokenizer\.json"):
        TokenizerSpec("auto", str(model)).load()
    model.write_text(json.dumps(json.loads(content) | {"config": 100_000, "vocab": 100_001}))  # words, no tekken.json
    assert TokenizerSpec("auto", str(model)).load().vocab_size == 100_002
    model.write_text(content)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"name it vocab\.json, with its merges\.txt beside"):
        TokenizerSpec("auto", str(model)).load()


# ---------------------------------------------------------------------------------------------------
# What is no model file


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("meta-llama/Llama-2-7b", "no such file; models are not downloaded: give the file tokenizer.json"),
        ("gpt2", "no such file; models are not downloaded"),
        ("folder", "is a folder or a device; give the file tokenizer.json or tokenizer.model in it"),
        ("/dev/zero", "is a folder or a device"),
        ("tiktoken.model", "is a tiktoken model; give the tokenizer.json"),
        ("missing.model", "no such file"),
        ("vocab.json", "is a vocabulary without the rules of a tokenizer; name it vocab.json, with its merges.txt"),
        ("tekken.json", "is a tekken.json; give the tokenizer.json of the same model"),
        ("list.json", "not a Hugging Face tokenizer.json"),
    ],
)
def test_what_is_no_model_file(tmp_path: Path, monkeypatch, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("tiktoken.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    Path("vocab.json").write_text('{"a": 0, "</s>": 1}')
    Path("tekken.json").write_text('{"config": {"pattern": "."}, "vocab": []}')
    Path("list.json").write_text("[]")
    with pytest.raises(UserError) as refused:
        TokenizerSpec("auto", name).load()
    assert str(refused.value).startswith(f"--tokenizer-model {name}: {words}") and "\n" not in str(refused.value)


def test_half_a_surrogate_is_refused(tmp_path: Path) -> None:
    for tokenizer in (ByteTokenizer(), exact_model("bpe", True, True), load_model(tmp_path, trained_bpe(), "t.json")):
        with pytest.raises(UnencodableText, match=r"no Unicode text|cannot be tokenized"):
            tokenizer.encode("a \ud800")


def test_ids_are_int32(tmp_path: Path) -> None:
    for tokenizer in (load_model(tmp_path, sentencepiece_bytes()), load_model(tmp_path, trained_bpe(), "t.json")):
        assert isinstance(tokenizer, (SentencePieceTokenizer, HuggingFaceTokenizer))
        assert [ids.dtype for ids in tokenizer.encode_batch(["a", "a \u2581"])] == [np.int32] * 2
