"""The choice of FlashAttention, and that PyTorch's registry has the names."""

from __future__ import annotations

import importlib
import inspect
from unittest import mock

import pytest
from torch.nn import attention

from cp import flash_version
from cp.flash_version import FLASH_IMPLS, use_flash_attention
from tests.flags import resolved
from utils.errors import UserError


@pytest.mark.parametrize("version", FLASH_IMPLS)
def test_pytorchs_registry_has_the_names_and_replaces_our_operators(version: str) -> None:
    impl = FLASH_IMPLS[version]
    assert impl.name in attention.list_flash_attention_impls()
    module = importlib.import_module(f"torch.nn.attention._fa{version}")
    register = getattr(module, f"register_flash_attention_fa{version}")
    assert inspect.signature(register).parameters["module_path"].default == impl.module
    source = inspect.getsource(getattr(module, f"_fa{version}_register_kernels"))
    assert '"_flash_attention_forward"' in source and '"_flash_attention_backward"' in source


@pytest.mark.parametrize(
    ("choice", "major", "installed", "activated"),
    [
        ("auto", 9, "34", ["FA3"]),
        ("auto", 9, "4", []),
        ("auto", 10, "34", ["FA4"]),
        ("auto", 10, "3", []),
        ("auto", 8, "34", []),
        ("2", 9, "34", []),
        ("3", 9, "3", ["FA3"]),
        ("4", 9, "4", ["FA4"]),
    ],
)
def test_the_version_fits_the_gpu_and_what_is_installed(
    choice: str, major: int, installed: str, activated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [FLASH_IMPLS[version].module for version in installed]
    monkeypatch.setattr(flash_version, "is_installed", lambda module: module in modules)
    with mock.patch.object(attention, "activate_flash_attention_impl") as activate:
        use_flash_attention(choice, major)
    assert [call.args[0] for call in activate.call_args_list] == activated


@pytest.mark.parametrize(
    ("choice", "major", "words"), [("3", 10, "runs on compute capability 9.0, not 10"), ("3", 9, "flash_attn_inter")]
)
def test_what_cannot_run_is_refused(choice: str, major: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"--flash-attention 3.*{words}.*use 2"):
        use_flash_attention(choice, major)


def test_kernels_of_another_pytorch_are_left_alone_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash_version, "is_installed", lambda module: True)
    error = RuntimeError("undefined symbol\nin a shared object")
    with mock.patch.object(attention, "activate_flash_attention_impl", side_effect=error):
        assert "flash_attn_interface does not fit this PyTorch (undefined symbol)" in use_flash_attention("auto", 9)
        with pytest.raises(UserError, match=r"--flash-attention 3: .*undefined symbol.*use 2"):
            use_flash_attention("3", 9)


def test_the_version_at_work_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash_version.flash_version() == "2"
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: "FA3")
    assert flash_version.flash_version() == "3"


def test_only_native_on_cuda_has_a_choice() -> None:
    assert resolved("--flash-attention", "3", "--device", "cuda", "--cp-backend", "native", cuda=1).flash_attention
    with pytest.raises(ValueError, match=r"--flash-attention 3 .*--cp-backend native.*--device cuda"):
        resolved("--flash-attention", "3", "--device", "cpu")
