"""Documents that begin with BOS (`--bos`), and tokens whose tokenizer is not at hand (`--eod-id`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from config.cli import parse_arguments
from config.schema import RunConfig
from data.build import build_dataset, build_tokens
from data.dataset import PackedDataset
from data.indexed_dataset import IndexedDataset, write_indexed_dataset
from data.packing import PackingOptions
from data.prepare import main
from data.sources import find_tokenizer, open_sources
from data.tokenizer import ByteTokenizer, TokenIds, Tokenizer, TokenizerSpec, UnencodableText
from tests.forked import run_script
from tests.launch import SMALL, environment, run_train, train
from tests.unit.test_tokenizers import byte_level, load_model, sentencepiece_bytes, unigram
from tools.hf.tokenizer import find_written_start, write_tokenizer
from training.sample import TextSampler
from utils.errors import UserError

TEXTS = ["a ring of ranks", "padding is silent, " * 9, "five axes make one loss. "] * 3
FLAGS = TokenizerSpec()


def model_file(folder: Path, kind: str) -> Path:
    """A tokenizer with BOS: a SentencePiece model's, or that of a template or a usual name in a tokenizer.json."""
    if kind == "sentencepiece":
        (folder / "m.model").write_bytes(sentencepiece_bytes())
        return folder / "m.model"
    said = json.loads(byte_level())
    name = "<|\u4e2d|>" if kind == "template" else "<s>"
    for token in said["added_tokens"]:  # ids 0, <eod>, and 1
        if token["id"] == 1:
            said["model"]["vocab"][name] = said["model"]["vocab"].pop(token["content"])
            token["content"] = name
    if kind == "template":
        part = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        special = {name: {"id": name, "ids": [1], "tokens": [name]}}
        template = {"single": part, "pair": part, "special_tokens": special}
        said["post_processor"] = {"type": "TemplateProcessing"} | template
    (folder / "t.json").write_text(json.dumps(said))
    return folder / "t.json"


def load(folder: Path, kind: str) -> Tokenizer:
    return TokenizerSpec("auto", str(model_file(folder, kind)), None, bos=True).load()


def write_text(folder: Path, texts: list[str] = TEXTS) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "a.jsonl"


def prepared(folder: Path, name: str, model: Path, *flags: str) -> Path:
    words = ["--input", str(write_text(folder)), "--output-prefix", str(folder / name), "--workers", "0", *flags]
    assert main([*words, "--tokenizer-model", str(model)]) == 0
    return folder / name


def documents(tokens: IndexedDataset) -> list[list[int]]:
    return [tokens.read(n, 0, length).tolist() for n, length in enumerate(tokens.lengths.tolist())]


# ---------------------------------------------------------------------------------------------------
# BOS


@pytest.mark.parametrize("kind", ["sentencepiece", "template", "name"])
def test_prepared_documents_begin_with_bos(tmp_path: Path, kind: str, capsys) -> None:
    model = model_file(tmp_path, kind)
    prefix = prepared(tmp_path, "p", model, "--bos")
    plain = TokenizerSpec("auto", str(model)).load()
    wanted = [[1, *plain.encode(text).tolist(), plain.eod] for text in TEXTS]
    assert documents(IndexedDataset(prefix)) == wanted
    assert f"each begins with BOS token 1, each ends with end-of-document token {plain.eod}" in capsys.readouterr().out
    assert json.loads(Path(f"{prefix}.json").read_text())["begin_of_document_token"] == 1
    # Text that train.py reads gets the same tokens; those without BOS have another place in the cache.
    tokenizer = load(tmp_path, kind)
    (source,) = open_sources([str(write_text(tmp_path))], "text")
    for one in (plain, tokenizer):
        found = documents(build_tokens(source.content, one, cache_path=tmp_path / "cache"))  # type: ignore[arg-type]
        assert found == (wanted if one is tokenizer else [ids[1:] for ids in wanted])
    assert tokenizer.decode(wanted[0]) == plain.decode(wanted[0][1:]) == TEXTS[0]
    assert tokenizer.encode_prompt("a ring") == [1, *plain.encode("a ring").tolist()]
    assert tokenizer.encode_prompt("") == [1] and plain.encode_prompt("") == plain.encode("\n").tolist()
    sizes = tokenizer.token_bytes()
    assert sizes is not None and sizes[1] == 0 == sizes[tokenizer.eod]


def test_each_byte_of_a_text_has_a_label_behind_bos(tmp_path: Path) -> None:
    """Only the first window of a long document begins with BOS."""
    tokenizer = load(tmp_path, "name")
    prefix = prepared(tmp_path, "p", model_file(tmp_path, "name"), "--bos")
    packing = PackingOptions(seq_length=16, method="best-fit", seed=1)
    data = PackedDataset(IndexedDataset(prefix), np.arange(len(TEXTS)), packing, pad_token=tokenizer.eod)
    sizes, counted, begins, pieces = tokenizer.token_bytes(), 0, 0, 0
    assert sizes is not None
    for n in range(data.samples_per_epoch):
        sample = data.sample(n)
        counted += int(sizes[sample.labels[sample.labels >= 0]].sum())
        begins += int((sample.tokens == 1).sum())
        pieces += int((sample.lengths > 0).sum())
        assert 1 not in sample.labels
    assert counted == sum(len(text.encode()) for text in TEXTS)
    assert begins == len(TEXTS) < pieces


def test_no_text_holds_bos(tmp_path: Path, capsys) -> None:
    file = model_file(tmp_path, "name")
    said = json.loads(file.read_text())
    said["added_tokens"][1]["special"] = False  # then the library finds the token in texts
    file.write_text(json.dumps(said))
    tokenizer = TokenizerSpec("auto", str(file), None, bos=True).load()
    with pytest.raises(UnencodableText, match="beginning-of-document token, id 1"):
        tokenizer.encode("a <s> b")
    words = ["--input", str(write_text(tmp_path, ["a", "a <s> b"])), "--output-prefix", str(tmp_path / "p")]
    assert main([*words, "--workers", "0", "--tokenizer-model", str(file), "--bos"]) == 2
    assert "a.jsonl:2 holds characters that become the beginning" in capsys.readouterr().err


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "m.model").write_bytes(sentencepiece_bytes(bos_id=-1))
    (tmp_path / "t.json").write_bytes(byte_level())
    for named in (("--tokenizer-model", "m.model"), ("--tokenizer-model", "t.json"), ("--tokenizer-type", "byte")):
        words = [str(tmp_path / word) if "." in word else word for word in named]
        flags = ["--input", str(write_text(tmp_path)), "--output-prefix", str(tmp_path / "p"), "--bos", *words]
        assert main(flags) == 2 and "has no BOS token" in capsys.readouterr().err
    with pytest.raises(UserError, match="trained on the text has no BOS"):
        find_tokenizer(open_sources([str(write_text(tmp_path))], "text"), [], replace(FLAGS, bos=True))


def test_a_trained_tokenizer_has_bos_where_asked(tmp_path: Path) -> None:
    text = str(write_text(tmp_path, ["a ring of ranks turns once. " * 20 + str(number) for number in range(20)]))
    words = ["train-tokenizer", "--input", text, "--vocab-size", "300", "--output"]
    models = [str(tmp_path / name) for name in ("plain.model", "bos.model")]
    assert main([*words, models[0]]) == main([*words, models[1], "--bos"]) == 0
    tokenizer = TokenizerSpec("auto", models[1], bos=True).load()
    assert tokenizer.encode_prompt("a <s>")[0] == tokenizer.bos == 2 and tokenizer.eod == 1
    assert tokenizer.decode(tokenizer.encode("a <s>")) == "a <s>"
    with pytest.raises(UserError, match="has no BOS token"):
        TokenizerSpec("auto", models[0], bos=True).load()


def test_sources_with_and_without_bos_do_not_mix(tmp_path: Path) -> None:
    model = model_file(tmp_path, "sentencepiece")
    begun, plain = prepared(tmp_path, "begun", model, "--bos"), prepared(tmp_path, "plain", model)
    text = str(write_text(tmp_path))

    def find(words: list[Path | str], others: list[Path] | None = None, bos: bool | None = None) -> int | None:
        sources, valid = (open_sources([str(w) for w in part], "text") if part else [] for part in (words, others))
        found = find_tokenizer(sources, valid, replace(FLAGS, bos=bos))
        assert found is not None
        return found.bos

    assert find([begun]) == find([begun, text]) == find([begun], bos=True) == 1
    assert find([plain]) is find([plain, text]) is find([plain], bos=False) is None
    for one, other in (([begun, plain], None), ([plain, begun], None), ([begun], [plain])):
        with pytest.raises(UserError, match=r"with.* BOS, unlike .*; prepare it again"):
            find(one, other)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"begin with BOS, unlike this run \(--no-bos"):
        find([begun], bos=False)
    with pytest.raises(UserError, match=r"begin without BOS, unlike this run \(--bos"):
        find([plain], bos=True)


def test_a_corpus_of_elsewhere_must_begin_with_bos(tmp_path: Path) -> None:
    """It has no P.json: the flag says so, and the documents are read."""
    tokenizer = load(tmp_path, "sentencepiece")
    packing = PackingOptions(seq_length=8, method="best-fit", seed=1)
    for first in (1, 5):
        write_indexed_dataset(tmp_path / f"m{first}", [np.array([1, 4, 5]), np.array([first, 4, 2])], vocab_size=300)
    options = dict(split=(1.0, 0.0, 0.0), which=0, flag="--data-path", cache_path=tmp_path / "cache")
    build_dataset(open_sources([str(tmp_path / "m1")], "text"), tokenizer, packing, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--bos: only 50\.0% of the documents of .*m5 begin with token 1"):
        build_dataset(open_sources([str(tmp_path / "m5")], "text"), tokenizer, packing, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep_template", [False, True])
@pytest.mark.parametrize("kind", ["sentencepiece", "template", "name"])
def test_an_export_begins_texts_as_the_run_did(tmp_path: Path, kind: str, keep_template: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = load(tmp_path, kind)
    start = find_written_start(tokenizer, keep_template)
    assert start is not None and start[0] == 1
    for name, content in write_tokenizer(tokenizer, max_positions=64, keep_template=keep_template).items():
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    there = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert there(text)["input_ids"] == tokenizer.encode_prompt(text)
    assert (there.bos_token_id, there.eos_token_id) == (1, tokenizer.eod)


def test_an_export_names_an_end_that_no_text_has(tmp_path: Path) -> None:
    """A Unigram model's `</s>` is renamed while texts are encoded, not in what others read."""
    from transformers import AutoTokenizer

    tokenizer = load_model(tmp_path, unigram().to_str().encode(), "t.json")
    assert tokenizer.processor.id_to_token(tokenizer.eod) != "</s>"
    for name, content in write_tokenizer(tokenizer, max_positions=64, keep_template=False).items():
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    there = AutoTokenizer.from_pretrained(tmp_path)
    assert (there.eos_token, there.eos_token_id, len(there)) == ("</s>", tokenizer.eod, tokenizer.vocab_size)


def test_a_run_knows_how_its_documents_begin(tmp_path: Path) -> None:
    """The checkpoint says so: to a resumed run, to tools/generate.py and to an export, which continue the same ids."""
    from transformers import AutoTokenizer

    from tests.wide_transformers import load_wide

    prefix = prepared(tmp_path, "p", model_file(tmp_path, "sentencepiece"), "--bos")
    flags = [word for word in SMALL if word not in ("--tokenizer-type", "byte")]
    flags += ["--data-path", str(prefix), "--data-cache-path", str(tmp_path / "cache"), "--device", "cpu"]
    flags += ["--seq-length", "64", "--log-interval", "1", "--eval-iters", "1"]
    run = tmp_path / "run"
    train(0, run, *flags, "--train-iters", "12", "--save-interval", "12", "--eval-interval", "12")
    step = next((run / "checkpoints").glob("step_*"))
    assert json.loads((step / "run.json").read_text())["--bos"] is True
    refused = run_train(0, "--run-dir", str(run), *flags, "--resume", "--train-iters", "13", "--no-bos")
    assert refused.returncode == 2 and "--no-bos: the checkpoint was made with other values" in refused.stderr
    resumed = run_train(0, "--run-dir", str(run), *flags, "--resume", "--train-iters", "13", "--sample-tokens", "2")
    assert resumed.returncode == 0 and "----- sample after training" in resumed.stdout, resumed.stderr

    words = ["--load", str(step), "--prompt", "a ring", "--tokens", "20", "--greedy", "--dtype", "fp64"]
    said = run_script("tools/generate.py", *words, "--device", "cpu", environment=environment(), timeout=200)
    words = ["export", "--load", str(step), "--output", str(tmp_path / "hf")]
    exported = run_script("tools/convert_hf.py", *words, environment=environment(), timeout=200)
    assert exported.returncode == 0, exported.stderr
    model, tokenizer = load_wide(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("a ring", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == 1 == model.config.bos_token_id
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    ids = ids[: int((ids == tokenizer.eos_token_id).nonzero()[:1].sum()) or None]
    assert said.stdout == tokenizer.decode(ids, skip_special_tokens=True) + "\n", said.stderr


# ---------------------------------------------------------------------------------------------------
# Tokens without their tokenizer


def ids_only(vocab_size: int | None = 20, eod_id: int = 0, **changes) -> TokenizerSpec:
    return replace(FLAGS, eod_id=eod_id, vocab_size=vocab_size, **changes)


def test_no_text_is_sampled_without_a_tokenizer() -> None:
    config = RunConfig()
    config.logging.sample_prompt = "def "  # of a preset
    sampler = TextSampler(None, ids_only().load(), config, mock.Mock(), [])  # type: ignore[arg-type]
    sampler.run("after training")


def test_ids_stand_for_texts() -> None:
    tokenizer = ids_only().load()
    assert tokenizer.encode_prompt("3 19\n4") == [3, 19, 4] and tokenizer.encode_prompt("") == [0]
    assert tokenizer.decode(np.array([3, 19, 0])) == "3 19" and tokenizer.token_bytes() is None
    for text in ("3 20", "-1", "def ", "9" * 5000, "4 0"):
        with pytest.raises(UnencodableText):
            tokenizer.encode(text)


def test_flags_without_a_tokenizer_are_checked(tmp_path: Path) -> None:
    for spec in (ids_only(None), ids_only(20, 20)):
        with pytest.raises(UserError, match=r"--eod-id \d+: needs --vocab-size"):
            spec.load()
    for changes in ({"kind": "byte"}, {"model": "m.model"}, {"bos": True}):
        with pytest.raises(UserError, match="give no --tokenizer-type"):
            ids_only(**changes).load()
    with pytest.raises(UserError, match=r"--eod-id 0: .*a.jsonl is text"):
        find_tokenizer(open_sources([str(write_text(tmp_path))], "text"), [], ids_only())
    named = prepared(tmp_path, "p", model_file(tmp_path, "sentencepiece"), "--bos")
    for model in tmp_path.glob("*.model"):
        model.unlink()
    assert isinstance(find_tokenizer(open_sources([str(named)], "text"), [], ids_only(400, 2)), TokenIds)
    with pytest.raises(UserError, match=r"--eod-id 0: the documents of .*p end with token 2"):
        find_tokenizer(open_sources([str(named)], "text"), [], ids_only(400, 0))
    said = json.loads(Path(f"{named}.json").read_text())
    for suffix in ("bin", "idx"):
        (tmp_path / f"q.{suffix}").write_bytes(Path(f"{named}.{suffix}").read_bytes())
    said["tokenizer"]["fingerprint"] = "another"
    (tmp_path / "q.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="made with different tokenizers"):
        find_tokenizer(open_sources([str(named), str(tmp_path / "q")], "text"), [], ids_only(400, 2))


@pytest.mark.parametrize("highest", [20, -1])
def test_ids_outside_the_vocabulary_are_refused_at_the_start(tmp_path: Path, highest: int) -> None:
    write_indexed_dataset(tmp_path / "m", [np.array([3, 4, 0]), np.array([5, highest, 0])], vocab_size=70_000)
    options = dict(split=(1.0, 0.0, 0.0), which=0, flag="--data-path", cache_path=tmp_path / "cache")
    packing = PackingOptions(seq_length=4, method="best-fit", seed=1)
    with pytest.raises(UserError, match=rf"m\.bin: holds token {highest}, but the tokenizer's are 0 to 19"):
        build_dataset(open_sources([str(tmp_path / "m")], "text"), ids_only().load(), packing, **options)  # type: ignore[arg-type]


def test_a_run_without_a_tokenizer(tmp_path: Path) -> None:
    """Trains as with the tokenizer, to the bit; resumes; continues ids; exports no tokenizer."""
    byte = ByteTokenizer()
    texts = [byte.frame(byte.encode(text * 3)) for text in TEXTS]
    write_indexed_dataset(tmp_path / "m", texts, vocab_size=257)
    flags = [word for word in SMALL if word not in ("--tokenizer-type", "byte")]
    flags += ["--data-path", str(tmp_path / "m"), "--data-cache-path", str(tmp_path / "cache"), "--device", "cpu"]
    flags += ["--seq-length", "64", "--train-iters", "2", "--log-interval", "1"]
    ids = ["--vocab-size", "257", "--eod-id", "256", "--save-interval", "1", "--eval-interval", "2"]
    found = train(0, tmp_path / "run", *flags, *ids, "--sample-tokens", "2")
    wanted = train(0, tmp_path / "other", *flags, "--tokenizer-type", "byte")
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (found, wanted)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    resumed = run_train(0, "--run-dir", str(tmp_path / "run"), *flags, *ids, "--resume", "--train-iters", "3")
    assert resumed.returncode == 0 and "samples of text and bits per byte are off" in resumed.stdout, resumed.stderr
    words = ["--load", str(tmp_path / "run"), "--prompt", "97 32", "--tokens", "3", "--greedy", "--device", "cpu"]
    said = run_script("tools/generate.py", *words, environment=environment(), timeout=200)
    assert said.stdout.startswith("97 32 ") and all(word.isdecimal() for word in said.stdout.split()), said.stderr
    words = ["export", "--load", str(tmp_path / "run"), "--output", str(tmp_path / "hf")]
    said = run_script("tools/convert_hf.py", *words, environment=environment(), timeout=200)
    assert "tokenizer: none; the run read ids" in said.stdout, said.stderr
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 256
    assert not list((tmp_path / "hf").glob("tokenizer*"))


def test_the_command_line_has_both() -> None:
    spec = parse_arguments(["--bos", "--eod-id", "3", "--vocab-size", "9"]).tokenizer
    assert spec == TokenizerSpec("auto", None, None, bos=True, eod_id=3, vocab_size=9)
