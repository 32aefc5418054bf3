"""Files from elsewhere never run code and never point out of their folder. Each bad file here would leave a mark if it
ran.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint import saver
from checkpoint.files import compute_checksums, find_replaced
from checkpoint.reader import SafeReader, UnsafeCheckpoint, _fill
from checkpoint.saver import Saver, load_checkpoint
from config.cli import parse_arguments
from data.blend import parse_blend
from data.indexed_dataset import IndexedDataset, write_indexed_dataset
from data.sources import open_sources
from data.tokenizer import TokenizerSpec
from metrics.log import APPEND_ONLY, open_metrics_file
from parallel.grid import GridSizes, build_grid
from tests.distributed.test_model_parity import built, config_of
from tests.distributed.test_reshard import optimizer_of
from tests.flags import resolve_config
from tools import checkpoint as checkpoint_tool
from utils.errors import UserError


class Mark:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture()
def saved(tmp_path: Path) -> Iterator[tuple]:
    """A checkpoint of a small model, and what loads it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    grid = build_grid(GridSizes())
    model = built(grid, config_of(), "fp32")
    optimizer = optimizer_of(model)
    Saver(tmp_path / "save", model, optimizer, grid).save(3, {})
    yield tmp_path / "save" / "step_0000003", lambda place: load_checkpoint(place, model, optimizer, grid)
    dist.destroy_process_group()


def rewrite(place: Path, name: str, content: bytes) -> None:
    """A file and its checksum, as whoever made it would."""
    (place / name).write_bytes(content)
    sums = json.loads((place / "checksums.json").read_text())
    sums |= compute_checksums([place / name])
    (place / "checksums.json").write_text(json.dumps(sums))


def index_of(place: Path) -> Metadata:
    return SafeReader(place).read_metadata()


def test_an_honest_checkpoint_loads(saved: tuple) -> None:
    place, load = saved
    assert load(place) == 3 and len(index_of(place).state_dict_metadata) > 10


def test_code_in_the_index(saved: tuple, tmp_path: Path, capsys) -> None:
    place, load = saved
    rewrite(place, ".metadata", pickle.dumps(Mark(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"posix\.mkdir|nt\.mkdir|os\.mkdir"):
        load(place)
    assert checkpoint_tool.main(["inspect", str(place)]) == 1 and "may run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    pickle.loads((place / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists()  # the trap works


def test_code_in_an_entry_that_is_no_tensor(saved: tuple, tmp_path: Path) -> None:
    """The library would unpickle it with weights_only=False."""
    place, load = saved
    metadata = index_of(place)
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    payload = io.BytesIO()
    torch.save(Mark(tmp_path / "ran"), payload)
    data = next(p for p in place.iterdir() if p.suffix == ".distcp")
    at = data.stat().st_size
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            info.offset, info.length = at, len(payload.getvalue())
    rewrite(place, data.name, data.read_bytes() + payload.getvalue())
    metadata.storage_data = {type(k)(k.fqn) if k.fqn == name else k: v for k, v in metadata.storage_data.items()}
    rewrite(place, ".metadata", pickle.dumps(metadata))
    with pytest.raises(ValueError, match="BytesStorageMetadata, which no checkpoint needs"):
        load(place)
    assert not (tmp_path / "ran").exists()
    dcp.load({name: torch.zeros(1)}, checkpoint_id=place, no_dist=True)
    assert (tmp_path / "ran").exists()  # the trap works


@pytest.mark.parametrize("where", ["../outside", "/etc/hostname", "__0_0.distcp/../../outside"])
def test_tensors_that_lie_elsewhere(saved: tuple, where: str) -> None:
    place, load = saved
    metadata = index_of(place)
    next(iter(metadata.storage_data.values())).relative_path = where
    rewrite(place, ".metadata", pickle.dumps(metadata))
    with pytest.raises(ValueError, match="no data file of this folder"):
        load(place)


class Changes:
    """Pickled, it sets an attribute of a class: the opcode BUILD does so to whatever stands before it."""

    def __init__(self, target: type, **attributes) -> None:
        self.target, self.attributes = target, attributes

    def index(self) -> bytes:
        name = f"c{self.target.__module__}\n{self.target.__qualname__}\n".encode()
        state = pickle.dumps((None, self.attributes), protocol=2)[2:-1]  # without its frame
        return b"\x80\x02" + name + state + b"b."


@pytest.mark.parametrize("target", [Metadata, MetadataIndex, type(Path())])
def test_an_index_changes_no_class(tmp_path: Path, target: type) -> None:
    before = dict(vars(target))
    (tmp_path / ".metadata").write_bytes(Changes(target, marked=7).index())
    with pytest.raises(UnsafeCheckpoint):
        SafeReader(tmp_path).read_metadata()
    assert dict(vars(target)) == before
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert target.marked == 7  # the trap works
    del target.marked


def index_that_builds(target: bytes, state: bytes) -> bytes:
    """A pickle that applies the opcode BUILD with `state` to the object that the opcodes `target` push."""
    return b"\x80\x02" + target + state + b"b."


ATTRIBUTES = pickle.dumps((None, {"marked": 7}), protocol=2)[2:-1]
ENTRIES = pickle.dumps({"_value_": 7}, protocol=2)[2:-1]
MEMBER = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R"


def test_an_index_changes_no_enum_member(tmp_path: Path) -> None:
    """BUILD writes into the `__dict__` of any object: an allowed call must not return one that the process shares."""
    (tmp_path / ".metadata").write_bytes(index_that_builds(MEMBER, ENTRIES))
    with pytest.raises(UnsafeCheckpoint):
        SafeReader(tmp_path).read_metadata()
    assert _MEM_FORMAT_ENCODING(0)._value_ == 0
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert _MEM_FORMAT_ENCODING(0)._value_ == 7  # the trap works
    _MEM_FORMAT_ENCODING(0)._value_ = 0


@pytest.mark.parametrize(
    "name", ["torch Size", "torch float32", "torch.serialization _get_layout", "torch nn", "builtins eval"]
)
def test_an_index_changes_no_global(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    shared = getattr(importlib.import_module(module), attribute)
    (tmp_path / ".metadata").write_bytes(index_that_builds(f"c{module}\n{attribute}\n".encode(), ATTRIBUTES))
    with pytest.raises(UnsafeCheckpoint):
        SafeReader(tmp_path).read_metadata()
    assert not hasattr(shared, "marked")


def test_a_class_that_is_changed_in_the_index_is_another_in_the_next(saved: tuple) -> None:
    """Stand-ins are made anew: what one index does to a class reaches neither the library's class nor another index."""
    place, load = saved
    content = (place / ".metadata").read_bytes()
    change = Changes(MetadataIndex, __getattribute__=torch.Size, fqn="other").index()[2:-1]
    rewrite(place, ".metadata", content[:2] + change + b"0" + content[2:])  # the change, dropped, then the honest index
    with contextlib.suppress(UserError):
        load(place)
    rewrite(place, ".metadata", content)
    assert load(place) == 3


@pytest.mark.parametrize("field", ["transform_descriptors", "offset", "length"])
def test_entries_of_other_types(saved: tuple, field: str) -> None:
    """A transform would choose an extension of the library by name."""
    place, load = saved
    metadata = index_of(place)
    setattr(next(iter(metadata.storage_data.values())), field, ("zstd",))
    rewrite(place, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match=f"holds tuple where {'NoneType' if field.startswith('t') else 'int'}"):
        load(place)


def test_text_that_is_a_subclass_of_text(saved: tuple) -> None:
    """Only exact types: a subclass could answer the check with one value and the library with another."""
    place, load = saved
    metadata = index_of(place)
    name, tensor = metadata.state_dict_metadata.popitem()
    metadata.state_dict_metadata[np.str_(name)] = tensor
    rewrite(place, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"numpy\."):
        load(place)


def test_an_index_that_contains_itself(tmp_path: Path) -> None:
    chunks: list = []
    chunks.append(chunks)
    tensor = TensorStorageMetadata(TensorProperties(), torch.Size([1]), chunks)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"x": tensor}, storage_data={})))
    with pytest.raises(UnsafeCheckpoint, match="holds list where ChunkStorageMetadata"):
        SafeReader(tmp_path).read_metadata()


def test_a_path_that_is_no_text(saved: tuple) -> None:
    place, load = saved
    metadata = index_of(place)
    next(iter(metadata.storage_data.values())).relative_path = Path("__0_0.distcp")
    rewrite(place, ".metadata", pickle.dumps(metadata))
    with pytest.raises(ValueError, match="where str should be"):
        load(place)


def nested(kind: type, depth: int = 20) -> object:
    """A container that holds another twice, and so on: `depth` objects, 2^depth steps for whoever follows each."""
    inner = kind()
    for _ in range(depth):
        inner = kind((inner, inner))
    return inner


def test_a_key_of_tuples_in_tuples_is_not_hashed(saved: tuple) -> None:
    place, load = saved
    metadata = index_of(place)
    metadata.planner_data = {nested(tuple): 0}
    rewrite(place, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match="key of type tuple"):
        load(place)


def test_lists_that_are_shared_cost_nothing(saved: tuple) -> None:
    place, load = saved
    metadata = index_of(place)
    metadata.planner_data = {"a": nested(list, 60), "b": nested(tuple, 60)}
    rewrite(place, ".metadata", pickle.dumps(metadata))
    assert load(place) == 3
    next(iter(metadata.storage_data.values())).relative_path = nested(list, 60)
    rewrite(place, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match="holds list where str"):
        load(place)


def chunks_of(metadata: Metadata) -> tuple[str, list[ChunkStorageMetadata]]:
    """A matrix of the model, and its chunks; in one part, as one rank writes it."""
    return next((n, x.chunks) for n, x in metadata.state_dict_metadata.items() if len(x.size) == 2)


def _no_chunk(chunks: list) -> None:
    chunks.clear()


def _half(chunks: list) -> None:
    chunks[0].sizes = torch.Size([chunks[0].sizes[0] // 2, chunks[0].sizes[1]])


def _outside(chunks: list) -> None:
    chunks[0].sizes = torch.Size([2 * chunks[0].sizes[0], chunks[0].sizes[1]])


def _below_zero(chunks: list) -> None:
    chunks[0].sizes = torch.Size([-n for n in chunks[0].sizes])


def _twice(chunks: list) -> None:
    chunks.append(chunks[0])


def _of_one_dimension(chunks: list) -> None:
    chunks[0].sizes = chunks[0].sizes[:1]


@pytest.mark.parametrize("change", [_no_chunk, _half, _outside, _below_zero, _twice, _of_one_dimension])
def test_chunks_that_do_not_fill_a_tensor(saved: tuple, change: Callable[[list], None]) -> None:
    """The library would leave the elements that no chunk holds at their random initial values."""
    place, load = saved
    metadata = index_of(place)
    name, chunks = chunks_of(metadata)
    change(chunks)
    rewrite(place, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match=rf"{name[:12]}.*has a chunk|{name[:12]}.*leave gaps"):
        load(place)
    assert checkpoint_tool.main(["verify", str(place)]) == 1


def test_halves_fill_a_tensor_and_overlaps_do_not() -> None:
    def fill(*boxes: tuple[int, int, int, int]) -> bool:
        chunks = [ChunkStorageMetadata(torch.Size([r, c]), torch.Size([h, w])) for r, c, h, w in boxes]
        return _fill(chunks, torch.Size([4, 6]))

    assert fill((0, 0, 4, 6)) and fill((0, 0, 3, 6), (3, 0, 1, 6)) and fill((0, 3, 4, 3), (0, 0, 4, 3))
    assert fill(*((r, c, 2, 3) for r in (2, 0) for c in (0, 3)))
    assert not fill((0, 0, 3, 6)) and not fill((0, 0, 3, 6), (2, 0, 2, 6)) and not fill((1, 0, 4, 6))
    assert not fill((0, 0, 2, 6), (0, 0, 2, 3), (2, 0, 2, 3))  # the sizes add up, and half is twice there


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.json", "checksums.json"])
def test_only_regular_files_are_read(saved: tuple, tmp_path: Path, name: str, kind: str) -> None:
    place, load = saved
    (place / name).rename(tmp_path / "outside")
    if kind == "link":
        (place / name).symlink_to(tmp_path / "outside")
    else:
        os.mkfifo(place / name) if kind == "FIFO" else (place / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: (is a link|is no regular file|Is a directory)"):
        load(place)
    assert checkpoint_tool.main(["verify", str(place)]) == 1


def saved_bytes(value: object, method: int = zipfile.ZIP_STORED, pickled: bytes | None = None) -> bytes:
    """What torch.save writes, with its members packed by `method`, and with another pickle."""
    saved, out = io.BytesIO(), io.BytesIO()
    torch.save(value, saved)
    with zipfile.ZipFile(out, "w", method) as archive, zipfile.ZipFile(saved) as source:
        for member in source.namelist():
            content = pickled if pickled and member.endswith("data.pkl") else source.read(member)
            archive.writestr(member, content)
    return out.getvalue()


CHUNKS: dict[str, Callable[[torch.Size], bytes]] = {
    "honest": lambda size: saved_bytes(torch.full(size, 7.0)),
    "compressed": lambda size: saved_bytes(torch.zeros(size), zipfile.ZIP_DEFLATED),
    "another module": lambda size: saved_bytes(torch.nn.Linear(1, 1)),
    "a list": lambda size: saved_bytes([torch.zeros(size)]),
    "a key of tuples": lambda size: saved_bytes(
        torch.zeros(size), pickled=pickle.dumps({nested(tuple): 0}, protocol=2)
    ),
    "larger": lambda size: saved_bytes(torch.zeros(size[0] + 1, size[1])),
    "one number, expanded": lambda size: saved_bytes(torch.zeros(1, 1).expand(size)),
    "another dtype": lambda size: saved_bytes(torch.zeros(size, dtype=torch.float64)),
    "no zip file": lambda size: bytes(1000),
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks_that_train_py_does_not_write(saved: tuple, kind: str) -> None:
    place, load = saved
    metadata = index_of(place)
    name, (chunk,) = chunks_of(metadata)
    info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
    data, payload = (place / info.relative_path).read_bytes(), CHUNKS[kind](chunk.sizes)
    info.offset, info.length = len(data), max(len(payload), info.length)
    rewrite(place, info.relative_path, data + payload.rjust(info.length, b"\0"))
    rewrite(place, ".metadata", pickle.dumps(metadata))
    if kind == "honest":
        assert load(place) == 3
        assert bool((SafeReader(place).read_tensor(name) == 7).all())
        return
    with pytest.raises(UserError, match=f"no chunk of {name}") as refused:
        load(place)
    assert "weights_only" not in str(refused.value)


def test_a_file_that_is_replaced_to_and_fro(saved: tuple, tmp_path: Path, monkeypatch) -> None:
    """What is verified must be what is loaded: the index is verified, then parsed."""
    place, load = saved
    bad, parse = tmp_path / "bad", saver.read_index
    bad.write_bytes((place / ".metadata").read_bytes())

    def swap() -> None:
        for one, other in ((place / ".metadata", tmp_path / "aside"), (bad, place / ".metadata")):
            one.rename(other)
        (tmp_path / "aside").rename(bad)

    def parse_the_bad_one(*args):
        swap()
        try:
            return parse(*args)
        finally:
            swap()

    monkeypatch.setattr(saver, "read_index", parse_the_bad_one)
    with pytest.raises(UserError, match=r"another process replaced \.metadata while it was loaded"):
        load(place)
    assert find_replaced([("a", "x", (1, 2), (3, 4)), ("a", "y", (9, 9), (3, 4))]) == []


def test_a_file_that_was_replaced_for_another_rank(saved: tuple, monkeypatch) -> None:
    """All ranks refuse alike, and no checkpoint is called corrupted."""
    place, load = saved
    gather, other = saver._gather, ([], None, {("__0_0.distcp", "another host", (1, 2), (3, 4))})
    monkeypatch.setattr(
        saver, "_gather", lambda work, group: gather(work, group) + [other] * ("_read_files" in work.__code__.co_names)
    )
    with pytest.raises(UserError, match=r"another process replaced __0_0\.distcp while it was loaded"):
        load(place)


@pytest.mark.parametrize("name", ["../other", "/dev/zero", ".."])
def test_checksums_name_files_of_the_folder_only(saved: tuple, name: str) -> None:
    place, load = saved
    sums = json.loads((place / "checksums.json").read_text())
    (place / "checksums.json").write_text(json.dumps(sums | {name: [1, "0"]}))
    with pytest.raises(ValueError, match="no file of this folder"):
        load(place)


def test_an_index_of_something_else(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsafeCheckpoint, match="not the index of a checkpoint"):
        SafeReader(tmp_path).read_metadata()


def test_yaml_presets(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(f"lr: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(ValueError, match="--config"):
        parse_arguments(["--config", str(tmp_path / "preset.yaml")])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("flag", ["data-path", "skip-steps"])
def test_a_yaml_list_smuggles_no_flag(tmp_path: Path, flag: str) -> None:
    for words in ("[--lr, '7']", "[x, --lr=7]", "[x, --dry-run]"):
        (tmp_path / "preset.yaml").write_text(f"{flag}: {words}\n")
        with pytest.raises(UserError, match=f"{flag} must be"):
            parse_arguments(["--config", str(tmp_path / "preset.yaml")])


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "[" * 5000, "lr: &a [*a]", "? [a, b]\n: 1", "lr: 1\nlr: 2"])
def test_presets_that_are_no_presets(tmp_path: Path, text: str) -> None:
    (tmp_path / "preset.yaml").write_text(text)
    with pytest.raises(UserError, match="--config") as refused:
        parse_arguments(["--config", str(tmp_path / "preset.yaml")])
    assert len(str(refused.value)) < 1000


def test_shared_lists_of_a_preset_are_not_written_out(tmp_path: Path) -> None:
    parts = ["&y0 [1]", *(f"&y{n} [*y{n - 1}, *y{n - 1}]" for n in range(1, 60))]
    (tmp_path / "preset.yaml").write_text(f"lr: [{', '.join(parts)}]")
    with pytest.raises(UserError, match="more than 40 levels deep") as refused:
        parse_arguments(["--config", str(tmp_path / "preset.yaml")])
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["tensorboard", "nonfinite", "profile"])
def test_a_runs_folders_are_no_links(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a link") as refused:
        resolve_config("--run-dir", str(tmp_path))
    if name == "tensorboard":
        assert "give its target with --tensorboard-dir" in str(refused.value)
        (tmp_path / name).unlink()
        resolve_config("--run-dir", str(tmp_path), "--tensorboard-dir", str(tmp_path / "elsewhere"))


def test_metrics_are_not_appended_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text\n")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "precious")
    for keep_before in (None, 3, APPEND_ONLY):
        with pytest.raises(UserError, match=r"is a link.*--metrics-file FILE"):
            open_metrics_file(tmp_path / "metrics.jsonl", keep_before)
    assert (tmp_path / "precious").read_text() == "text\n"
    (tmp_path / "metrics.jsonl").unlink()
    os.link(tmp_path / "precious", tmp_path / "metrics.jsonl")  # as a backup links a copy
    with open_metrics_file(tmp_path / "metrics.jsonl", 3) as file:
        file.write(b"x")
    assert (tmp_path / "precious").read_text() == "text\n"


@pytest.mark.parametrize("flag", ["--data-path", "--config"])
def test_merge_keys_of_yaml_are_not_expanded(tmp_path: Path, flag: str) -> None:
    """Each level would double the pairs of the one before."""
    lines = ["a0: &a0 {x: y}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40))]
    (tmp_path / "deep.yaml").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"{flag} .*deep\.yaml"):
        parse_arguments([flag, str(tmp_path / "deep.yaml")])
        parse_blend([str(tmp_path / "deep.yaml")])


def test_yaml_blends(tmp_path: Path) -> None:
    (tmp_path / "blend.yaml").write_text(
        f"- path: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n  weight: 1\n"
    )
    with pytest.raises(ValueError, match="--data-path"):
        open_sources([str(tmp_path / "blend.yaml")], "text")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("kind", "name"), [("sentencepiece", "t.model"), ("huggingface", "tokenizer.json")])
def test_tokenizers(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Mark(tmp_path / "ran")))
    with pytest.raises(ValueError, match="--tokenizer-model"):
        TokenizerSpec(kind, str(tmp_path / name), None).load()
    assert not (tmp_path / "ran").exists()


def test_token_files(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "good", [np.arange(5)], vocab_size=10)
    (tmp_path / "bad.bin").write_bytes((tmp_path / "good.bin").read_bytes())
    (tmp_path / "bad.idx").write_bytes(pickle.dumps(Mark(tmp_path / "ran")).ljust(200, b"\0"))
    with pytest.raises(ValueError, match=r"bad\.idx"):
        IndexedDataset(tmp_path / "bad")
    assert not (tmp_path / "ran").exists()


def test_a_corpus_names_no_tokenizer_elsewhere(tmp_path: Path) -> None:
    """What its JSON calls the model is looked for beside it, whatever folder it names."""
    write_indexed_dataset(tmp_path / "c", [np.arange(5)], vocab_size=10)
    (tmp_path / "secret.model").touch()
    (tmp_path / "in").mkdir()
    for kind in ("bin", "idx"):
        (tmp_path / f"c.{kind}").rename(tmp_path / "in" / f"c.{kind}")
    facts = {
        "documents": 1,
        "tokens": 5,
        "tokenizer": {
            "type": "sentencepiece",
            "model": "../secret.model",
            "eod": None,
            "fingerprint": "x",
            "vocab_size": 10,
        },
    }
    (tmp_path / "in" / "c.json").write_text(json.dumps(facts))
    (part,) = open_sources([str(tmp_path / "in" / "c")], "text")
    with pytest.raises(ValueError, match=r"in/secret\.model"):
        part.content.tokenizer()  # type: ignore[union-attr]
