"""Small groups of operations as one kernel: a function under `fused` is compiled by torch.compile where kernels are on.

Kernels are on in runs on CUDA (`--fused-kernels`). Elsewhere, and so in every run on the CPU, PyTorch runs the function
one operation at a time, to the same bits as without the decorator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Function = Callable[..., Any]
MAX_COMPILATIONS = 64  # of a function; beyond it PyTorch would run its operations apart, with a warning only

_build: Callable[[Function], Function] | None = None  # makes a function's kernel; None: kernels are off


@functools.cache
def compile_kernel(function: Function) -> Function:
    """torch.compile, with any number of tokens: the first dimension of every tensor.

    Other dimensions and strides are constants of the code, so that loads stay aligned; each new combination of them
    compiles once more.
    """
    torch._dynamo.config.recompile_limit = max(MAX_COMPILATIONS, torch._dynamo.config.recompile_limit)
    compiled = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not torch.is_grad_enabled():  # whether an input requires a gradient would be another combination
            args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
        for x in args:
            if isinstance(x, torch.Tensor) and x.dim():
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(*args)

    return call


def fused(function: Function) -> Function:
    """Decorator of a function of positional arguments. Inside other compiled code it is part of that code."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _build is None:
            return function(*args)
        return _build(function)(*args)

    return call


def use_kernels(build: Callable[[Function], Function] | None = compile_kernel) -> None:
    """Make kernels of all functions under `fused` from now on, by `build`; None: turn kernels off."""
    global _build
    _build = build


@contextmanager
def kernels(build: Callable[[Function], Function] | None = compile_kernel) -> Iterator[None]:
    """`use_kernels` within this context."""
    before = _build
    use_kernels(build)
    try:
        yield
    finally:
        use_kernels(before)
