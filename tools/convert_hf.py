"""Export a checkpoint as a Hugging Face model, or import one to train it further: one process, no GPU.

    python tools/convert_hf.py export --load RUN --output DIR      a folder for transformers' from_pretrained
    python tools/convert_hf.py import --input DIR --output RUN     for train.py --config RUN/model.yaml --load RUN
                                                                   --load-weights-only

Tensors are read and written one at a time. The output folder gets its name when it is complete (docs/huggingface.md).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint.files import (
    CorruptedCheckpoint,
    OpenedFile,
    compute_checksums,
    find_corrupted,
    find_replaced,
    find_run_checkpoint,
    find_unlisted,
    publish,
    read_checksums,
    read_run_metadata,
    scratch_folder,
    step_folder,
)
from checkpoint.reader import SafeReader
from checkpoint.resume import IMPORTED
from config.cli import parse_arguments
from data.tokenizer import HuggingFaceTokenizer, TokenIds, Tokenizer, TokenizerSpec, find_start
from model.config import GPTConfig, count_parameters
from tools.generate import add_tokenizer_flags, find_tokenizer, read_model_config
from tools.hf.config import (
    MAX_SIZE,
    describe_generation,
    describe_lost,
    list_ends,
    model_flags,
    read_config,
    read_positions,
    write_config,
)
from tools.hf.tokenizer import find_end_token, find_tokenizer_file, find_written_start, write_tokenizer
from tools.hf.weights import (
    ShardReader,
    check_weights,
    list_weights,
    read_json_file,
    write_checkpoint_files,
    write_shards,
)
from training.build import COMPUTE_DTYPES
from utils.errors import OneLineParser, UserError, run_tool
from utils.files import new_folder

UNKNOWN_POSITIONS = 2048  # where neither checkpoint nor config.json says for which length a model was trained


def count_numbers(config: GPTConfig) -> int:
    """Weights of the model as Hugging Face has them: without padded rows of the vocabulary."""
    return count_parameters(replace(config, padded_vocab_size=config.vocab_size))


def export_model(
    load: Path,
    output: Path,
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
    keep_template: bool,
    flags: TokenizerSpec,
) -> int:
    """Write the model of a checkpoint as a Hugging Face folder.

    Args:
        dtype: of the files; None: as stored.
        shard_bytes, keep_template: as `write_shards` and `write_tokenizer` take them.
        flags: of the tokenizer, as `find_tokenizer` takes them.

    Raises:
        UserError: a corrupted checkpoint, a model or tokenizer without counterpart, or an output that exists.
    """
    checkpoint, opened = find_run_checkpoint(load), set[OpenedFile]()
    metadata = read_run_metadata(checkpoint, opened)
    tokenizer = find_tokenizer(checkpoint, metadata, flags)
    config, reader = read_model_config(checkpoint, metadata), SafeReader(checkpoint)
    tensors = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
    for weight in list_weights(config):
        about = tensors.get(f"model.{weight.name}")
        if about is None or tuple(about.size) != weight.shape:
            size = "missing" if about is None else list(about.size)
            raise UserError(f"--load {checkpoint}: {weight.name} is {size}; run.json says {list(weight.shape)}")
    positions = metadata.get("--seq-length")
    positions = positions if type(positions) is int and 1 <= positions <= MAX_SIZE else UNKNOWN_POSITIONS

    def stored(name: str) -> torch.dtype:
        return tensors[f"model.{name}"].properties.dtype

    dtype_name = str(dtype or stored("embedding.weight")).removeprefix("torch.")
    start = find_written_start(tokenizer, keep_template)
    bos = start[0] if start else None
    said = write_config(config, max_positions=positions, bos=bos, eod=tokenizer.eod, dtype=dtype_name)
    files = write_tokenizer(tokenizer, max_positions=positions, keep_template=keep_template)
    files["config.json"] = json.dumps(said, indent=2) + "\n"
    ends = {"eos_token_id": tokenizer.eod} | ({} if bos is None else {"bos_token_id": bos})
    files["generation_config.json"] = json.dumps(ends, indent=2) + "\n"
    with new_folder(output) as scratch:
        sums = read_checksums(checkpoint, opened)
        if errors := find_corrupted(checkpoint, sorted(sums), sums, opened) + find_unlisted(checkpoint, sums):
            raise CorruptedCheckpoint(errors[0])
        for name, content in files.items():
            (scratch / name).write_text(content, encoding="utf-8")
        shards = write_shards(
            scratch,
            config,
            stored,
            lambda name: reader.read_tensor(f"model.{name}"),
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
        for shard in scratch.glob("*.safetensors"):  # the library lets only the owner read
            shutil.copymode(scratch / "config.json", shard)
        if replaced := find_replaced([*opened, *reader.opened]):
            raise UserError(f"--load {checkpoint}: another process replaced {replaced[0]} meanwhile; start again")
    numbers = f"{count_numbers(config):,} numbers as {dtype_name}"
    print(f"{output}: {said['architectures'][0]}, {numbers} in {shards} file{'s' * (shards > 1)}")
    if isinstance(tokenizer, TokenIds):
        print("tokenizer: none; the run read ids (--eod-id)")
    elif isinstance(tokenizer, HuggingFaceTokenizer) and not start:
        print("tokenizer: adds no special tokens to a text, as in training; --keep-template keeps the file's template")
    return 0


def import_model(folder: Path, output: Path, *, tokenizer_model: str | None, eod: str | None) -> int:
    """Write a Hugging Face folder as a run: a checkpoint of weights, the tokenizer, and a preset of the model's flags.

    Args:
        tokenizer_model: None: the folder's own.
        eod: end-of-document token of a tokenizer.json; None: the one that config.json names.

    Raises:
        UserError: the folder holds no model of ours, or something that no such model needs; or an output that exists.
    """
    if not folder.is_dir():
        raise UserError(f"--input {folder}: no such folder; models are not downloaded")
    where = str(folder / "config.json")
    said = read_json_file(folder / "config.json")
    config, positions = read_config(said, where), read_positions(said, where)
    reader = ShardReader(folder)
    checked = check_weights(reader, config)
    file = Path(tokenizer_model) if tokenizer_model else find_tokenizer_file(folder)
    generation = _read_generation(folder)
    ends = list_ends(said) or list_ends(generation)
    others = [end for end in list_ends(generation) if end not in ends]
    if eod is None and file.suffix == ".json" and ends:
        eod = find_end_token(file, ends[0])
    tokenizer = TokenizerSpec("auto", str(file), eod).load()
    if tokenizer.kind == "sentencepiece" and ends and tokenizer.eod not in ends:
        raise UserError(
            f"{where}: eos_token_id {short_repr(ends if ends[1:] else ends[0])}; {file} ends a document with "
            f"{tokenizer.eod}; set eos_token_id to {tokenizer.eod}, or give --tokenizer-model tokenizer.json"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{file}: {tokenizer.vocab_size} tokens; config.json has vocab_size {config.vocab_size}")
    metadata: dict[str, Any] = {f"model {n}": v for n, v in vars(config).items() if not n.endswith("_dropout")}
    metadata |= {"tokenizer": tokenizer.fingerprint, IMPORTED: " ".join(folder.resolve().name.split())}
    if positions:
        metadata["--seq-length"] = positions
    with new_folder(output) as scratch:
        _write_run_files(scratch, output, config, tokenizer, eod=eod, metadata=metadata)
        save = scratch / "checkpoints"
        part = scratch_folder(save, 0)
        part.mkdir(parents=True)
        write_checkpoint_files(part, reader, config, checked)
        sums = compute_checksums(sorted(part.iterdir()))
        publish(part, step_folder(save, 0), run_metadata=metadata | {"step": 0}, sums=sums)
    print(f"{output}: {said['model_type']}, {count_numbers(config):,} numbers")
    start = find_start(tokenizer)  # of the template
    lost = describe_lost(said, ends=[*ends, *others], bos=start[0] if start else None, eod=tokenizer.eod)
    for line in (*lost, *describe_generation(generation)):
        print(line)
    print(f"train.py --config {output / 'model.yaml'} --load {output} --load-weights-only")
    return 0


def _read_generation(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json; empty without one. Raises UserError: not a mapping."""
    file = folder / "generation_config.json"
    said = read_json_file(file) if os.path.lexists(file) else {}
    if not isinstance(said, dict):
        raise UserError(f"{file}: must be a mapping")
    return said


def _write_run_files(
    scratch: Path, output: Path, config: GPTConfig, tokenizer: Tokenizer, *, eod: str | None, metadata: dict[str, Any]
) -> None:
    """Write tokenizer, preset and config.json into `scratch`, which becomes `output`."""
    name = "tokenizer.json" if tokenizer.kind == "huggingface" else "tokenizer.model"
    (scratch / name).write_bytes(tokenizer.content)
    flags = model_flags(config) | {"tokenizer_type": tokenizer.kind, "tokenizer_model": str(output / name)}
    flags |= {"tokenizer_eod": eod} if eod else {}
    lines = [f"# {metadata[IMPORTED]}, imported by tools/convert_hf.py. Needs --load RUN --load-weights-only."]
    if "--seq-length" in metadata:
        lines.append(
            f"# Trained for {metadata['--seq-length']} positions: longer samples need another rotary embedding."
        )
    dumped = yaml.safe_dump({key.replace("_", "-"): value for key, value in flags.items()}, sort_keys=False)
    preset = scratch / "model.yaml"
    preset.write_text("\n".join([*lines, dumped]), encoding="utf-8")
    told = {"flags": parse_arguments(["--config", str(preset)]).flags()}  # where tools look for the tokenizer
    (scratch / "config.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="export|import")
    export = commands.add_parser("export", allow_abbrev=False)
    add_tokenizer_flags(export)
    add = export.add_argument
    add("--load", type=Path, required=True, help="a run's folder, a folder of checkpoints, or one checkpoint")
    add("--output", type=Path, required=True, help="new folder of the Hugging Face model")
    add("--dtype", choices=COMPUTE_DTYPES, help="dtype of the written weights; default: as in the checkpoint")
    add("--shard-size", type=float, default=5.0, metavar="GB", help="largest file of weights, in 10^9 bytes")
    add("--keep-template", action="store_true", help="keep what a tokenizer.json puts around a text, such as a BOS")
    add = commands.add_parser("import", allow_abbrev=False).add_argument
    add("--input", type=Path, required=True, help="folder with config.json and safetensors files")
    add("--output", type=Path, required=True, help="new folder of the run")
    add("--tokenizer-model", help="SentencePiece model or tokenizer.json; default: the input's own")
    add(
        "--tokenizer-eod", metavar="TOKEN", help="end-of-document token of a tokenizer.json; default: config.json's end"
    )
    args = parser.parse_args(argv)
    if args.command == "export" and not 0 < args.shard_size < float("inf"):
        raise UserError(f"--shard-size {args.shard_size}: must be above 0")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.command == "import":
        return import_model(args.input, args.output, tokenizer_model=args.tokenizer_model, eod=args.tokenizer_eod)
    return export_model(
        args.load,
        args.output,
        dtype=COMPUTE_DTYPES[args.dtype] if args.dtype else None,
        shard_bytes=int(args.shard_size * 1e9),
        keep_template=args.keep_template,
        flags=TokenizerSpec(args.tokenizer_type, args.tokenizer_model, args.tokenizer_eod),
    )


if __name__ == "__main__":
    sys.exit(run_tool(main))
