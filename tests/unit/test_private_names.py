"""Private names of PyTorch that `--cp-backend pytorch`, the checkpoint reader and the planner use are there."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import pickletools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cp.pytorch_cp as backend
from checkpoint.reader import ALLOWED, FIELDS, SafeReader, UnsafeCheckpoint
from planner.memory import measure_step
from tests.flags import resolve_config


def test_this_pytorch_has_what_is_used() -> None:
    assert backend.load_private() is backend.torch_cp


@pytest.mark.parametrize("gone", [*backend.PRIVATE_FUNCTIONS, "_cp_options"])
def test_a_name_that_moved_is_named(gone: str, monkeypatch) -> None:
    there = {
        name: getattr(backend.torch_cp, name) for name in (*backend.PRIVATE_FUNCTIONS, "_cp_options") if name != gone
    }
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(**there))
    wanted = "enable_load_balance" if gone == "_cp_options" else f"{gone} is gone"
    with pytest.raises(ValueError, match=rf"--cp-backend pytorch: .*{wanted}.*--cp-backend native"):
        backend.load_private()


def test_other_parameters_are_named(monkeypatch) -> None:
    there = {name: getattr(backend.torch_cp, name) for name in (*backend.PRIVATE_FUNCTIONS, "_cp_options")}
    there["_templated_ring_attention"] = lambda mesh, dim: None
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(**there))
    with pytest.raises(ValueError, match="_templated_ring_attention takes mesh, dim"):
        backend.load_private()


def test_a_module_that_moved_is_named(monkeypatch) -> None:
    monkeypatch.setattr(backend, "PRIVATE_MODULE", "torch.distributed.no_such_place")
    with pytest.raises(ValueError, match=r"torch\.distributed\.no_such_place is gone"):
        backend.load_private()


def test_records_of_a_checkpoint_have_the_fields_that_the_reader_checks() -> None:
    """A new field of a record is looked at before it is ignored: it may choose how bytes are read."""
    ignored = {"Metadata": {"planner_data", "storage_meta"}}
    for kind, fields in FIELDS.items():
        found = {field.name for field in dataclasses.fields(kind)}
        assert found - ignored.get(kind.__name__, set()) == set(fields), kind.__name__


def test_an_index_of_this_pytorch_names_what_the_reader_allows(tmp_path: Path) -> None:
    state = {"a": torch.ones(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.bfloat16)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    metadata = SafeReader(tmp_path).read_metadata()
    whole = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert metadata.state_dict_metadata == whole.state_dict_metadata and metadata.storage_data == whole.storage_data
    assert metadata.version == whole.version
    names = [arg for op, arg, _ in pickletools.genops((tmp_path / ".metadata").read_bytes()) if "UNICODE" in op.name]
    assert {name for module, name in ALLOWED if "metadata" in module} <= set(names)
    loaded = {name: SafeReader(tmp_path).read_tensor(name) for name in state}
    assert all(torch.equal(loaded[name], x) for name, x in state.items())
    dcp.save({"a": "text"}, checkpoint_id=tmp_path / "text", no_dist=True)
    with pytest.raises(UnsafeCheckpoint, match="BytesStorageMetadata"):
        SafeReader(tmp_path / "text").read_metadata()


def test_the_planner_finds_what_fsdp_and_schedules_do() -> None:
    """Labels come from names of operators; a renamed one would move its bytes to another label."""
    sizes = "--num-layers 4 --pp-size 2 --dp-shard-size 2 --global-batch-size 8"
    config = resolve_config(*sizes.split(), "--dtype", "bf16", "--device", "cpu", world=4)
    peaks = measure_step(config, config.model.architecture(257), stage=1, num_microbatches=4)
    assert set(peaks) >= {"activations", "logits and loss", "backward pass of the last layer", "update"}
    for label in ("weights", "optimiser states", "gathered weights", "pipeline buffers", "sent messages", "gradients"):
        assert peaks["backward pass of the last layer"][label] > 0, label
    update = peaks["update"]
    assert update["optimiser states"] >= 2 * update["weights"] and update["gradients"] == update["weights"]
    assert update.get("gathered weights", 0) == 0, "resharded after the backward pass"
