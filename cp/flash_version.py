"""Which FlashAttention computes PyTorch's flash operators on CUDA (`--flash-attention`).

PyTorch comes with FlashAttention-2. Its registry replaces the operators that `cp/kernels.py` calls by those of an
installed FlashAttention-3 or 4, for the whole process.
"""

from __future__ import annotations

from typing import NamedTuple

from torch.nn import attention

from utils.errors import MissingPackageError, UserError, is_installed


class FlashImpl(NamedTuple):
    """Name in PyTorch's registry, module of the kernels, major compute capabilities, and those that `auto` takes."""

    name: str
    module: str
    majors: tuple[int, ...]
    auto: int


FLASH_IMPLS = {
    "3": FlashImpl("FA3", "flash_attn_interface", (9,), 9),
    "4": FlashImpl("FA4", "flash_attn.cute.interface", (9, 10), 10),
}


def installed_versions() -> list[str]:
    """Versions beside PyTorch's own that are installed; every rank must have the same."""
    return [version for version, impl in FLASH_IMPLS.items() if is_installed(impl.module)]


def use_flash_attention(choice: str, major: int) -> str:
    """Compute the operators by version `choice`; auto: the newest that is installed and made for this GPU, else 2.

    Args:
        major: compute capability of the GPU, 9 for Hopper.

    Returns:
        A warning of auto: what is installed and cannot be used; empty: none.

    Raises:
        UserError: the version does not run on this GPU, is not installed, or does not fit this PyTorch.
    """
    for version, impl in FLASH_IMPLS.items():
        if choice == version and major not in impl.majors:
            legal = " or ".join(f"{n}.0" for n in impl.majors)
            raise UserError(f"--flash-attention {version} runs on compute capability {legal}, not {major}: use 2")
        if choice == version and not is_installed(impl.module):
            raise MissingPackageError(
                f"--flash-attention {version}: no module {impl.module}; install FlashAttention-{version}, or use 2"
            )
        if choice == version or (choice == "auto" and major == impl.auto and is_installed(impl.module)):
            try:
                attention.activate_flash_attention_impl(impl.name)
            except Exception as error:  # a foreign package, built for another PyTorch
                first_line = str(error).partition("\n")[0]
                reason = f"{impl.module} does not fit this PyTorch ({first_line})"
                if choice == version:
                    raise UserError(f"--flash-attention {version}: {reason}; use 2") from error
                return f"{reason}; FlashAttention-2 computes"
    return ""


def flash_version() -> str:
    """The version at work."""
    return (attention.current_flash_attention_impl() or "FA2").removeprefix("FA")
