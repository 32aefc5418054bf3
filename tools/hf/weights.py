"""Weights of our checkpoints and of safetensors files, one tensor at a time."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from checkpoint.saver import first_cause
from model.config import GPTConfig
from utils.errors import UserError
from utils.files import open_regular, parse_json
from utils.logger import one_line

SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
INDEX_FILE, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
MAX_JSON = 1 << 28  # bytes; the index of a model of a trillion weights has a few MiB
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NO_WEIGHT = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")  # in files of old transformers


@dataclass(frozen=True)
class Weight:
    """One of our tensors and its tensors at Hugging Face.

    Attributes:
        name: canonical, as in a checkpoint below `model.`.
        parts: (name, shape) there: one, or query, key and value of a fused QKV weight.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]


def list_weights(config: GPTConfig) -> Iterator[Weight]:
    """Yield every weight of the model, layer by layer: a hostile number of layers takes no memory."""
    c, h, d = config, config.hidden_size, config.kv_channels

    def same(name: str, theirs: str, *shape: int) -> Weight:
        return Weight(name, shape, ((theirs, shape),))

    def table(name: str, theirs: str) -> Weight:  # ours is padded
        return Weight(name, (c.padded_vocab_size, h), ((theirs, (c.vocab_size, h)),))

    yield table("embedding.weight", "model.embed_tokens.weight")
    for n in range(c.num_layers):
        ours, theirs = f"layers.{n}", f"model.layers.{n}"
        yield same(f"{ours}.attention.qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", h)
        heads = (("q", c.num_attention_heads), ("k", c.num_query_groups), ("v", c.num_query_groups))
        parts = tuple((f"{theirs}.self_attn.{name}_proj.weight", (count * d, h)) for name, count in heads)
        yield Weight(f"{ours}.attention.qkv.weight", (c.qkv_size, h), parts)
        for name in ("q_norm", "k_norm") if c.qk_norm else ():
            yield same(f"{ours}.attention.{name}.weight", f"{theirs}.self_attn.{name}.weight", d)
        yield same(f"{ours}.attention.output.weight", f"{theirs}.self_attn.o_proj.weight", h, c.query_size)
        yield same(f"{ours}.mlp.layer_norm_weight", f"{theirs}.post_attention_layernorm.weight", h)
        for name, there in (("gate_weight", "gate_proj"), ("up_weight", "up_proj")):
            yield same(f"{ours}.mlp.{name}", f"{theirs}.mlp.{there}.weight", c.ffn_hidden_size, h)
        yield same(f"{ours}.mlp.fc2_weight", f"{theirs}.mlp.down_proj.weight", h, c.ffn_hidden_size)
    yield same("final_norm.weight", "model.norm.weight", h)
    if not c.tie_embeddings:
        yield table("lm_head.weight", "lm_head.weight")


def view_parts(whole: Tensor, weight: Weight, config: GPTConfig) -> Sequence[Tensor]:
    """Views of our tensor that hold its parts at Hugging Face: 3 of a fused QKV weight, else one.

    A fused weight has per group its query heads, its key head, its value head. Both rotate halves of a head, so no
    channel moves within a head. Padded rows of a vocabulary are in no part.
    """
    c = config
    if len(weight.parts) == 3:
        by_group = whole.view(c.num_query_groups, c.queries_per_group + 2, c.kv_channels, c.hidden_size)
        return by_group.split((c.queries_per_group, 1, 1), dim=1)  # [g, hq/g or 1, d, h] each
    return (whole[: weight.parts[0][1][0]],)


# ---------------------------------------------------------------------------------------------------
# From Hugging Face


def read_json_file(path: Path) -> Any:
    """Content of a JSON file of a folder from elsewhere. Raises UserError: missing, a link, too large or not JSON."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON} bytes")
        return parse_json(content)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}{_hint_links(path)}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({one_line(error)[:200]})") from error


def _hint_links(path: Path) -> str:
    """What to do about a link, such as the files of the hub's cache are."""
    return "; copy the folder with cp -rL, or download with --local-dir" if path.is_symlink() else ""


class ShardReader:
    """The tensors of a folder's safetensors files, of which one is open at a time.

    Every file is a regular file of the folder, never a link; the library checks that a file holds what its header says.

    Raises:
        UserError: no safetensors files, or an index that does not fit them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, str] = {}  # tensor -> file
        self._open: tuple[str, Any] = ("", None)
        listed = self._list_files()
        for name in sorted(set(listed.values())) if listed else [ONE_FILE]:
            for tensor in self._file(name).keys():  # noqa: SIM118 - no mapping
                if tensor in self.where:
                    raise UserError(f"{folder / name}: holds {short_repr(tensor)}, as {self.where[tensor]} does")
                self.where[tensor] = name
        for tensor, name in listed.items():
            if self.where.get(tensor) != name:
                raise UserError(f"{folder / INDEX_FILE}: {name} holds no {short_repr(tensor)}")

    def _list_files(self) -> dict[str, str]:
        """The index's file of each tensor; empty: one file without an index. Raises UserError."""
        index, single = self.folder / INDEX_FILE, self.folder / ONE_FILE
        has_single = single.is_symlink() or single.exists()
        if not index.is_symlink() and not index.exists():
            if has_single:
                return {}
            found = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
            if found:
                raise UserError(
                    f"{self.folder / found[0]}: pickled weights, which may run code; convert them to safetensors with "
                    "transformers (save_pretrained) where you trust them"
                )
            raise UserError(f"{self.folder}: neither {ONE_FILE} nor {INDEX_FILE} there")
        if has_single:  # transformers reads this one, other readers those of the index
            raise UserError(f"{single}: {INDEX_FILE} is there too; remove the one whose weights are older")
        listed = read_json_file(index)
        listed = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise UserError(f"{index}: has no weight_map")
        for name in listed.values():
            if not isinstance(name, str) or not SHARD.fullmatch(name):
                raise UserError(f"{index}: names {short_repr(name)}, which is no safetensors file of this folder")
        return listed

    def _file(self, name: str) -> Any:
        if self._open[0] != name:
            path = self.folder / name
            self._open = ("", None)  # closes the other file
            try:
                open_regular(path).close()
                # Read, not mapped: a file that is cut meanwhile would end the process.
                self._open = (name, safe_open(path, framework="pt", backend="pread"))
            except OSError as error:
                raise UserError(f"{path}: {error.strerror or error}{_hint_links(path)}") from error
            except SafetensorError as error:
                raise UserError(f"{path}: not a safetensors file ({one_line(error)[:200]})") from error
        return self._open[1]

    def find(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor. Raises UserError: missing, or of a dtype that is no float of 16 to 64 bits."""
        if name not in self.where:
            raise UserError(f"{self.folder}: has no tensor {name}")
        about = self._file(self.where[name]).get_slice(name)
        if about.get_dtype() not in DTYPES:
            raise UserError(
                f"{self.folder / self.where[name]}: {name} is {about.get_dtype()}; supported are {', '.join(DTYPES)}"
            )
        return tuple(about.get_shape()), DTYPES[about.get_dtype()]

    def read(self, name: str) -> Tensor:
        """The whole tensor. Raises UserError: the file changed meanwhile, or a value is NaN or infinite."""
        try:
            tensor = self._file(self.where[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / self.where[name]}: {name}: {one_line(error)[:200]}") from error
        if not all(math.isfinite(value) for value in torch.aminmax(tensor)):  # isfinite().all() takes more memory
            raise UserError(f"{self.folder / self.where[name]}: {name}: has values that are NaN or infinite")
        return tensor


def check_weights(reader: ShardReader, config: GPTConfig) -> dict[str, tuple[Weight, torch.dtype]]:
    """Return each of our weights with its dtype, after a check of every tensor's name, shape and dtype.

    Raises:
        UserError: a tensor is missing, has another shape or dtype, or has no place in our model.
    """
    checked: dict[str, tuple[Weight, torch.dtype]] = {}
    used: set[str] = set()
    for weight in list_weights(config):
        dtypes = set()
        for name, wanted in weight.parts:
            shape, dtype = reader.find(name)
            if shape != wanted:
                raise UserError(
                    f"{reader.folder / reader.where[name]}: {name} is {list(shape)}; config.json says {list(wanted)}"
                )
            dtypes.add(dtype)
            used.add(name)
        if len(dtypes) > 1:
            names = ", ".join(f"{name} {reader.find(name)[1]}" for name, _ in weight.parts)
            raise UserError(f"{reader.folder}: {names}: must have one dtype")
        checked[weight.name] = weight, dtypes.pop()
    unknown = [name for name in reader.where if name not in used and not NO_WEIGHT.fullmatch(name)]
    if config.tie_embeddings and "lm_head.weight" in unknown:
        _check_tied(reader)
        unknown.remove("lm_head.weight")
    if unknown:
        raise UserError(f"{reader.folder}: {short_repr(sorted(unknown)[0])} has no place in our model")
    return checked


def _check_tied(reader: ShardReader) -> None:
    """Refuse a head that is stored beside a tied embedding and differs. Reads blocks of rows."""
    shape, dtype = reader.find("model.embed_tokens.weight")
    if (shape, dtype) != reader.find("lm_head.weight"):
        raise UserError(f"{reader.folder}: lm_head.weight differs from the embedding, but config.json ties them")
    for start in range(0, shape[0], 4096):
        names, stop = ("model.embed_tokens.weight", "lm_head.weight"), min(start + 4096, shape[0])
        blocks = [reader._file(reader.where[name]).get_slice(name)[start:stop] for name in names]
        if not torch.equal(*blocks):
            raise UserError(f"{reader.folder}: lm_head.weight differs from the embedding, but config.json ties them")


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Resolves each tensor of the plan when the writer comes to it; the state dict holds tensors without content."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.read(index.fqn.removeprefix("model."))


def write_checkpoint_files(
    folder: Path, reader: ShardReader, config: GPTConfig, checked: dict[str, tuple[Weight, torch.dtype]]
) -> None:
    """Write the model's tensors into a checkpoint's folder, a file a tensor, each read when it is written."""

    def read(name: str) -> Tensor:
        weight, dtype = checked[name]
        if weight.shape == weight.parts[0][1]:
            return reader.read(weight.parts[0][0])
        whole = torch.zeros(weight.shape, dtype=dtype)  # rows of a padded vocabulary stay 0
        for (part, _), place in zip(weight.parts, view_parts(whole, weight, config), strict=True):
            place.copy_(reader.read(part).view(place.shape))
        return whole

    state = {"model": {n: torch.empty(w.shape, dtype=dtype, device="meta") for n, (w, dtype) in checked.items()}}
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
    with warnings.catch_warnings():  # of no_dist, that there is no process group
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        try:
            dcp.save(state, storage_writer=writer, planner=_ReadWhenWritten(read), no_dist=True)
        except CheckpointException as error:
            raise first_cause({rank: failure[0] for rank, failure in error.failures.items()})[1] from error


# ---------------------------------------------------------------------------------------------------
# To Hugging Face


def write_shards(
    folder: Path,
    config: GPTConfig,
    stored: Callable[[str], torch.dtype],
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> int:
    """Write safetensors files and their index, a shard at a time. Return the number of shards.

    Args:
        stored: dtype of a weight of the checkpoint, by canonical name.
        read: the whole weight.
        dtype: of the files; None: as stored.
        shard_bytes: a file holds no more, unless one weight is larger.
    """
    shards: list[list[Weight]] = [[]]
    held = total = 0
    for weight in list_weights(config):
        size = sum(torch.Size(shape).numel() for _, shape in weight.parts) * (dtype or stored(weight.name)).itemsize
        if held + size > shard_bytes and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(weight)
        held, total = held + size, total + size
    where: dict[str, str] = {}
    for number, weights in enumerate(shards, 1):
        name = ONE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for weight in weights:
            whole = read(weight.name)
            for (part, shape), view in zip(weight.parts, view_parts(whole, weight, config), strict=True):
                tensors[part] = view.reshape(shape).to(dtype or whole.dtype).contiguous()
            del whole, view
        where |= dict.fromkeys(tensors, name)
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / name}: {one_line(error)}") from error
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return len(shards)
