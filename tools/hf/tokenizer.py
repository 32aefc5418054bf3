"""Tokenizers of runs as `tokenizer.json` and `tokenizer_config.json`, and the other way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from data.tokenizer import (
    PROBES,
    SPACE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TokenIds,
    Tokenizer,
    UnencodableText,
    describe_tokenizer,
    find_start,
    load_sentencepiece,
)
from tools.hf.weights import read_json_file
from utils.errors import UserError
from utils.files import parse_json

BYTE_EOD = "<|endoftext|>"  # name of the byte tokenizer's end-of-document token
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def write_tokenizer(tokenizer: Tokenizer, *, max_positions: int, keep_template: bool) -> dict[str, str]:
    """Return the tokenizer's files by name, with which transformers encodes as the run did.

    Args:
        keep_template: leave the template of a tokenizer.json, which puts special tokens around each text.

    Raises:
        UserError: transformers would give other ids.
    """
    eod: str | None
    if isinstance(tokenizer, TokenIds):
        return {}
    if isinstance(tokenizer, ByteTokenizer):
        said, eod = _describe_bytes(), BYTE_EOD
    elif isinstance(tokenizer, SentencePieceTokenizer):
        said, eod = _describe_pieces(tokenizer.content)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        said, eod = parse_json(tokenizer.content), _written_name(tokenizer, tokenizer.eod)
        said |= {"truncation": None, "padding": None}
        if not keep_template or tokenizer.bos is not None:
            said["post_processor"] = _without_template(said.get("post_processor"))
    start = find_written_start(tokenizer, keep_template)
    if start and tokenizer.bos is not None:
        said["post_processor"] = _begin_with(*start, said.get("post_processor"))
    content = json.dumps(said, ensure_ascii=False)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        _check_same(tokenizer, content)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        **({"bos_token": start[1], "add_bos_token": True} if start else {}),
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": content,
        "tokenizer_config.json": json.dumps(about, indent=2, ensure_ascii=False) + "\n",
    }


def find_written_start(tokenizer: Tokenizer, keep_template: bool) -> tuple[int, str] | None:
    """(id, token) of the BOS that the exported tokenizer puts before a text: the run's, or the kept template's."""
    if tokenizer.bos is None:
        return find_start(tokenizer) if keep_template else None
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.bos, tokenizer.processor.id_to_piece(tokenizer.bos)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer.bos, _written_name(tokenizer, tokenizer.bos)


def _written_name(tokenizer: HuggingFaceTokenizer, number: int) -> str:
    """The token in the tokenizer's file, which `HuggingFaceTokenizer` may have renamed so that no text has its id."""
    return str(tokenizer.processor.id_to_token(number)).strip("\0")


def _begin_with(number: int, token: str, others: dict[str, Any] | None) -> dict[str, Any]:
    """A post-processor that puts one token before a text, after `others`."""
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB")]
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    template = {"single": [begin, texts[0]], "pair": [begin, *texts], "special_tokens": special}
    parts = [others] if others else []
    return {"type": "Sequence", "processors": [*parts, {"type": "TemplateProcessing"} | template]}


def _without_template(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """The post-processor without what adds special tokens to a text."""
    if processor is None or processor.get("type") in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
        return None
    if processor.get("type") == "Sequence":
        kept = [part for one in processor["processors"] if (part := _without_template(one)) is not None]
        return processor | {"processors": kept}
    return processor


def _check_same(tokenizer: Tokenizer, content: str) -> None:
    """Raises UserError: the library reads other ids from the file than the run had."""
    import tokenizers

    there = tokenizers.Tokenizer.from_str(content)
    for text in (*PROBES, *_own_texts(tokenizer)):
        try:
            wanted = tokenizer.encode(text).tolist()
        except UnencodableText:
            continue
        found = there.encode(text, add_special_tokens=False).ids
        if found != wanted:
            raise UserError(
                f"tokenizer: {short_repr(text)} would become {short_repr(found)} in transformers, in the run it is "
                f"{short_repr(wanted)}; this tokenizer cannot be exported"
            )


def _own_texts(tokenizer: Tokenizer, count: int = 2000) -> Iterator[str]:
    """Texts of the vocabulary's own tokens, alone and in sequences."""
    step = max(1, tokenizer.vocab_size // count)
    ids = [i for i in range(0, tokenizer.vocab_size, step) if i != tokenizer.eod]
    for at in range(0, len(ids), 8):
        yield tokenizer.decode(ids[at : at + 8]).replace("\ufffd", "")
        yield tokenizer.decode(ids[at : at + 1]).replace("\ufffd", "")


def _added(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


def _describe_bytes() -> dict[str, Any]:
    """tokenizer.json of raw bytes: a byte-level vocabulary without merges, and the EOD."""
    # GPT-2's printable letter of each byte: itself where it is printable, else the next from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": vocab | {BYTE_EOD: 256}, "merges": []}
    return describe_tokenizer(model, pre_tokenizer=level, decoder=level, added_tokens=[_added(256, BYTE_EOD)])


def _describe_pieces(content: bytes) -> tuple[dict[str, Any], str]:
    """(tokenizer.json of a SentencePiece model, its end-of-sentence piece). Raises UserError: no such model."""
    library = load_sentencepiece().sentencepiece_model_pb2
    model = library.ModelProto.FromString(content)
    kinds, pieces = library.ModelProto.SentencePiece.Type, model.pieces
    if named := [piece.piece for piece in pieces if piece.type == kinds.USER_DEFINED]:
        raise UserError(f"tokenizer: {len(named)} user-defined pieces, such as {named[0]!r}, have no counterpart")
    prefix = model.normalizer_spec.add_dummy_prefix
    has_bytes = any(piece.type == kinds.BYTE for piece in pieces)
    unknown = next(n for n, piece in enumerate(pieces) if piece.type == kinds.UNKNOWN)
    if model.trainer_spec.model_type == library.TrainerSpec.BPE:
        vocab = {piece.piece: n for n, piece in enumerate(pieces)}
        said = {
            "type": "BPE",
            "vocab": vocab,
            "merges": _find_merges({p.piece: p.score for p in pieces if p.type == kinds.NORMAL}, vocab),
            "unk_token": pieces[unknown].piece,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
        }
    elif model.trainer_spec.model_type == library.TrainerSpec.UNIGRAM:
        scores = [[piece.piece, piece.score] for piece in pieces]
        said = {"type": "Unigram", "unk_id": unknown, "vocab": scores, "byte_fallback": has_bytes}
    else:
        raise UserError("tokenizer: a SentencePiece model of words or characters has no counterpart")
    to_sign = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [to_sign | {"pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    first = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    special = [n for n, piece in enumerate(pieces) if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    described = describe_tokenizer(
        said,
        normalizer={"type": "Sequence", "normalizers": [*first, to_sign]},
        decoder={"type": "Sequence", "decoders": decoders},
        added_tokens=[_added(n, pieces[n].piece) for n in special],
    )
    return described, pieces[model.trainer_spec.eos_id].piece


def _find_merges(scores: dict[str, float], vocab: dict[str, int]) -> list[list[str]]:
    """Pairs of pieces whose union is a piece, the union's best score first: the order in which SentencePiece merges."""
    found = []
    for piece, score in scores.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = sorted((vocab[a], vocab[b]) for a, b in pairs if a in scores and b in scores)
        found += [(-score, vocab[piece], pair) for pair in known]
    names = {number: piece for piece, number in vocab.items()}
    return [[names[a], names[b]] for _, _, (a, b) in sorted(found)]


# ---------------------------------------------------------------------------------------------------
# From Hugging Face


def find_tokenizer_file(folder: Path) -> Path:
    """The tokenizer's file of a model's folder. Raises UserError: there is none, or a link."""
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_symlink():
            raise UserError(f"{path}: is a link, which is not followed; copy the folder with cp -rL")
        if path.is_file():
            return path
        if path.exists():
            raise UserError(f"{path}: is no regular file")
    raise UserError(f"{folder}: neither {' nor '.join(TOKENIZER_FILES)} there; give --tokenizer-model FILE")


def find_end_token(file: Path, eos: Any) -> str:
    """The token of a tokenizer.json with the id that config.json calls the end.

    Args:
        eos: of `eos_token_id`.

    Raises:
        UserError: no such token.
    """
    said = read_json_file(file)
    model = said.get("model") if isinstance(said, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[Any, Any] = {}
    if isinstance(vocab, dict):
        tokens = {number: token for token, number in vocab.items() if type(number) is int}
    elif isinstance(vocab, list):
        tokens = {n: entry[0] for n, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    added = said.get("added_tokens") if isinstance(said, dict) else None
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            tokens[entry["id"]] = entry.get("content")
    found = tokens.get(eos) if type(eos) is int else None
    if not isinstance(found, str):
        raise UserError(
            f"{file}: has no token with the id {short_repr(eos)} of config.json's eos_token_id; give --tokenizer-eod"
        )
    return found
