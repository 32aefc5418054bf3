"""The models of transformers in float64 throughout.

The library casts norms and rotary tables to float32 in models of any dtype. Here its own source is compiled once more
with those casts widened, and nothing else changed.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from types import ModuleType
from typing import Any

WIDER = {"torch.float32": "torch.float64", "torch.float)": "torch.float64)", ".float()": ".double()"}


@cache
def widen(name: str) -> ModuleType:
    """A second module of the same source with wider casts."""
    original = importlib.import_module(name)
    source = inspect.getsource(original)
    for narrow, wide in WIDER.items():
        source = source.replace(narrow, wide)
    module = ModuleType(name)
    module.__file__, module.__package__, module.__spec__ = original.__file__, original.__package__, original.__spec__
    exec(compile(source, str(original.__file__), "exec", dont_inherit=True), module.__dict__)
    if name != "transformers.modeling_rope_utils":
        module.ROPE_INIT_FUNCTIONS = widen("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS  # type: ignore[attr-defined]
    return module


def load_wide(folder: Any) -> Any:
    """The model of a folder, in float64."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    module = widen(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    model = getattr(module, config.architectures[0]).from_pretrained(folder, dtype=torch.float64).eval()
    rotary = model.model.rotary_emb
    if rotary.rope_type != "default":  # the library's loading filled the buffer by its own, narrower functions
        rotary.inv_freq = module.ROPE_INIT_FUNCTIONS[rotary.rope_type](config)[0]
    return model
