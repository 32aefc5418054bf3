"""Transformer Engine itself, without a GPU: the whole model from te_layers.py on the meta device, beside the one from
torch_layers.py.

    make test-te-import TE_PYTHON=<python of an environment in which `import transformer_engine.pytorch` works>

Not part of `make test`: such an environment takes gigabytes (docs/gpu.md). No kernel can run here; constructors can,
once told that there is a Hopper card.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

te = pytest.importorskip("transformer_engine.pytorch", exc_type=(ImportError, RuntimeError, OSError))

from cp.attention import build_attention  # noqa: E402
from cp.layout import shard_indices  # noqa: E402
from cp.packed_seq import build_packed_seq  # noqa: E402
from cp.support import SUPPORT, AttentionRequest, choose  # noqa: E402
from cp.te_attention import TEAttention, thd_arguments  # noqa: E402
from model.config import FP8_RECIPES, GPTConfig  # noqa: E402
from model.gpt import GPT  # noqa: E402
from model.layers import build_precision, get_layers  # noqa: E402
from model.transformer import GPTOptions  # noqa: E402
from parallel.grid import Grid, GridSizes, build_grid, split_group  # noqa: E402
from parallel.tensor import TensorParallel  # noqa: E402


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What constructors ask of the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.fixture
def world() -> Iterator[None]:
    """Eight ranks, of which this is one: the others are imagined (the fake backend's collectives do nothing)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def config_of(**changes) -> GPTConfig:
    shape = dict(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=704,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=32,
        vocab_size=1000,
        padded_vocab_size=1024,
    )
    return GPTConfig(**(shape | changes))


def model_of(implementation: str, config: GPTConfig, grid: Grid, sequence_parallel: bool, layers: range) -> GPT:
    with torch.device("meta"):
        return GPT(
            config,
            attention=lambda *_: None,
            cp_group=grid.group("cp"),
            options=GPTOptions(dtype=torch.float32, compute_dtype=torch.bfloat16, implementation=implementation),
            tp=TensorParallel(grid.group("tp"), sequence_parallel and grid.size("tp") > 1),
            layers=layers,
        )


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize(
    "sizes", [dict(dp_shard=8), dict(tp=2, cp=4), dict(tp=4, dp_shard=2), dict(pp=2, tp=2, cp=2)], ids=str
)
def test_parameters_have_the_same_names_and_shapes(world, sizes: dict, sequence_parallel: bool, changes: dict) -> None:
    grid, config = build_grid(GridSizes(**sizes)), config_of(**changes)
    for layers in [range(4)] if "pp" not in sizes else [range(2), range(2, 4)]:
        ours, theirs = (model_of(name, config, grid, sequence_parallel, layers) for name in ("torch", "te"))
        assert [(n, p.shape, p.dtype, p.device) for n, p in theirs.named_parameters()] == [
            (n, p.shape, p.dtype, p.device) for n, p in ours.named_parameters()
        ]
        assert all(p.device.type == "meta" for p in theirs.parameters())


def test_the_fused_tensor_of_the_mlp_is_gate_above_up(world) -> None:
    grid = build_grid(GridSizes(tp=2, dp_shard=4))
    with torch.device("meta"):
        mlp = get_layers("te").LayerNormMLP(
            256, 704, eps=1e-5, dtype=torch.float32, tp=TensorParallel(grid.group("tp"), True)
        )
    inner = dict(mlp.hidden[0].named_parameters())
    assert {n: tuple(p.shape) for n, p in inner.items()} == {
        "layer_norm_weight": (256,), "fc1_weight": (704, 256), "fc2_weight": (256, 352),
    }  # fmt: skip
    assert mlp.hidden[0].activation == "swiglu" and mlp.hidden[0].normalization == "RMSNorm"
    assert (mlp.hidden[0].tp_size, mlp.hidden[0].sequence_parallel, mlp.hidden[0].set_parallel_mode) == (2, True, True)


@pytest.mark.parametrize(
    ("method", "size"),
    [*((e.method, 2 if e.method == "a2a+p2p" else None) for e in SUPPORT if e.backend == "te"), ("a2a+p2p", 1)],
)
def test_attention_is_built_with_its_group(
    world, monkeypatch: pytest.MonkeyPatch, method: str, size: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream")
    grid = build_grid(GridSizes(cp=4, dp_shard=2))
    options = dict(
        qkv_format="thd", layout="auto", dtype="bf16", device="cuda", cp_size=4, a2a_size=size, heads_k_stride=None
    )
    choice = choose(AttentionRequest(backend="te", method=method, head_dim=64, heads=8, groups=4, **options))
    groups = split_group(grid, "cp", choice.a2a_size) if choice.a2a_size > 1 else None
    attention = build_attention(choice, head_dim=64, a2a_groups=groups)
    assert isinstance(attention, TEAttention)
    dpa = attention._module(8, 4, 64, grid.group("cp"))
    assert dpa is attention._module(8, 4, 64, grid.group("cp"))
    assert dpa.cp_comm_type == ("p2p" if size == 1 else method) and list(dpa.cp_global_ranks) == [0, 1, 2, 3]
    assert dpa.cp_group == (list(groups) if method == "a2a+p2p" and groups else grid.group("cp"))


def fp8(monkeypatch: pytest.MonkeyPatch, name: str, group, bf16_layers=()):
    """Constructed as for a Hopper card; scales on the CPU, where they would be on the card."""
    from transformer_engine.pytorch import quantization

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=9, minor=0))
    make = quantization.DelayedScalingRecipeState.__init__
    monkeypatch.setattr(
        quantization.DelayedScalingRecipeState,
        "__init__",
        lambda self, *a, **k: make(self, *a, **(k | {"device": torch.device("cpu")})),
    )
    return build_precision(name, group=group, bf16_layers=bf16_layers)


@pytest.mark.parametrize("name", FP8_RECIPES[1:])
def test_fp8_regions(world, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Delayed: one region around all layers, so that largest values are reduced once; others: one a layer; none in
    layers that stay.
    """
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    grid = build_grid(GridSizes(dp_shard=8))
    precision = fp8(monkeypatch, name, grid.group("stage"), bf16_layers=(0, 3))
    reduced = []
    monkeypatch.setattr(
        FP8GlobalStateManager, "reduce_and_update_fp8_tensors", lambda forward=True: reduced.append(forward)
    )
    seen = []
    with precision.model_context():
        for number in range(4):
            with precision.layer_context(number):
                seen.append(FP8GlobalStateManager.is_fp8_enabled())
                if seen[-1]:
                    assert FP8GlobalStateManager.get_fp8_group() is grid.group("stage")
    assert seen == [False, True, True, False] and not FP8GlobalStateManager.is_fp8_enabled()
    assert reduced == ([True] if name == "delayed" else [True, True])


def test_delayed_scaling_keeps_its_state(world, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = build_grid(GridSizes(tp=2, dp_shard=4))
    precision = fp8(monkeypatch, "delayed", grid.group("stage"), bf16_layers=(0,))
    model = model_of("te", config_of(num_layers=2), grid, True, range(2))
    state = precision.state(model)
    assert {n: tuple(x.shape) for n, x in state.items() if n.endswith("scale")} == {
        "layers.1.attention.qkv.scaling_fwd.scale": (3,), "layers.1.attention.qkv.scaling_bwd.scale": (2,),
        "layers.1.attention.output.scaling_fwd.scale": (3,), "layers.1.attention.output.scaling_bwd.scale": (2,),
        "layers.1.mlp.scaling_fwd.scale": (6,), "layers.1.mlp.scaling_bwd.scale": (4,),
    }  # fmt: skip
    state["layers.1.mlp.scaling_fwd.scale"].fill_(5.0)
    module = dict(model.named_modules())["layers.1.mlp"].hidden[0]
    with precision.model_context():
        module.init_fp8_metadata(num_gemms=2)  # what the first forward does
    assert precision.state(model)["layers.1.mlp.scaling_fwd.scale"].tolist() == [5.0] * 6
    assert module.fp8_meta["scaling_fwd"].scale.tolist() == [5.0] * 6
    assert fp8(monkeypatch, "current", grid.group("stage")).state(model) == {}


def test_a_card_without_8_bits_is_refused_with_the_reason(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.te_layers.RECIPES", {"block": (None, lambda return_reason: (False, "too old"))})
    with pytest.raises(ValueError, match="--fp8 block: too old"):
        build_precision("block", group=None, bf16_layers=())  # type: ignore[arg-type]


def test_rotary_angles_are_those_of_our_tables() -> None:
    """Turned back below 2 pi in float64, so that the kernel's float32 is enough for position 1,000,000."""
    from model import rope, te_layers

    positions = torch.tensor([0, 3, 1_000_000])
    frequencies = rope.rotary_frequencies(config_of(kv_channels=8))
    cos, sin = rope.rotary_tables(positions, frequencies, dtype=torch.float64)
    (angles,) = te_layers.rotary_tables(positions, frequencies, dtype=torch.float32)
    assert angles.shape == (3, 1, 1, 8) and angles.dtype == torch.float32
    assert (angles[:, 0, 0].double().cos() - torch.cat((cos, cos), -1)).abs().max() < 1e-6
    assert (angles[:, 0, 0].double().sin() - torch.cat((sin, sin), -1)).abs().max() < 1e-6
    # Its own plain code with the same arguments turns as ours does.
    x = torch.randn(3, 2, 5, 8)
    theirs = te_layers.te_rope.apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=False)
    assert (
        theirs - rope.apply_rotary(x, *rope.rotary_tables(positions, frequencies, dtype=torch.float32))
    ).abs().max() < 1e-5


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_zigzag_is_its_order_of_tokens(cp_size: int) -> None:
    """Through the plain code of its own slicing, which runs on the CPU; the compiled index function is compared on a
    GPU.
    """
    from transformer_engine.pytorch.attention.dot_product_attention.context_parallel import get_batch_on_this_cp_rank

    padded = np.array([8, 24, 16, 40])
    tokens = torch.arange(int(padded.sum()))[None]
    cu = torch.from_numpy(np.concatenate([[0], padded.cumsum()])).int()
    for rank in range(cp_size):
        monkey = SimpleNamespace(size=lambda: cp_size, rank=lambda rank=rank: rank)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_world_size", lambda group=None: cp_size)
            patch.setattr(dist, "get_rank", lambda group=None, rank=rank: rank)
            theirs, _, _ = get_batch_on_this_cp_rank(cu, tokens, tokens, tokens[0], cp_group=monkey, qvk_format="thd")
        ours = shard_indices(padded, cp_size=cp_size, cp_rank=rank, layout="zigzag")
        assert theirs.flatten().tolist() == tokens[0][torch.from_numpy(ours)].tolist()


def test_a_packed_row_is_told_both_lengths() -> None:
    packed_seq, _ = build_packed_seq(np.array([5, 8, 0]), np.array([8, 8, 16]), cp_size=2, cp_rank=0)
    told = thd_arguments(packed_seq)
    assert told["pad_between_seqs"] is True and told["max_seqlen_q"] == 8
    assert told["cu_seqlens_q"].tolist() == [0, 5, 13, 13] and told["cu_seqlens_q_padded"].tolist() == [0, 8, 16, 32]
    whole, _ = build_packed_seq(np.array([8, 8]), np.array([8, 8]), cp_size=2, cp_rank=0)
    assert thd_arguments(whole)["pad_between_seqs"] is False


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("qkv_format", ["thd", "bshd"])
@pytest.mark.parametrize("method", [e.method for e in SUPPORT if e.backend == "te"])
def test_its_own_filter_lets_our_table_pass(
    monkeypatch: pytest.MonkeyPatch, method: str, qkv_format: str, cp_size: int
) -> None:
    """What our table offers, its Python filter leaves to the fused kernels; what cuDNN itself says needs a driver, and
    is taken for yes.
    """
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    if method == "a2a+p2p" and cp_size < 4:
        pytest.skip("two levels need four ranks")
    size = 2 if method == "a2a+p2p" else None
    options = dict(
        qkv_format=qkv_format,
        layout="auto",
        dtype="bf16",
        device="cuda",
        cp_size=cp_size,
        a2a_size=size,
        heads_k_stride=None,
    )
    choose(AttentionRequest(backend="te", method=method, head_dim=64, heads=8, groups=4, **options))
    yes = int(utils.FusedAttnBackend["F16_arbitrary_seqlen"])
    monkeypatch.setattr(utils, "_get_fused_attn_backend", lambda **_: (yes, ""))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=9, minor=0))
    packed_seq, _ = build_packed_seq(np.array([30, 64, 0]), np.array([32, 64, 32]), cp_size=cp_size, cp_rank=0)
    told = (
        thd_arguments(packed_seq)
        if qkv_format == "thd"
        else {"max_seqlen_q": 128, "max_seqlen_kv": 128, "pad_between_seqs": False}
    )
    asked = utils.AttentionParams(
        qkv_layout="_".join([qkv_format] * 3),
        num_heads=8,
        num_gqa_groups=4,
        head_dim_qk=64,
        head_dim_v=64,
        attn_mask_type=told.get("attn_mask_type", "causal"),
        window_size=(-1, 0),
        context_parallel=cp_size > 1,
        cp_comm_type=method,
        cp_size=cp_size,
        cp_size_a2a=size or 1,
        **{name: told[name] for name in ("max_seqlen_q", "max_seqlen_kv", "pad_between_seqs")},
    )
    _, _, fused, backend, _, _ = utils.get_attention_backend(asked)
    assert fused and backend == yes


def test_what_kernels_leave_in_padding_goes_nowhere(world, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that writes NaN in every row of padding, forward and backward, leaves zeros there and the rest alone."""

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return torch.where(padding, float("nan"), q + v.repeat_interleave(2, 1)).flatten(1)

        @staticmethod
        def backward(ctx, grad):
            grad = grad.view(-1, 4, 8)
            assert not grad[padding[:, 0, 0]].any()
            grad = torch.where(padding, float("nan"), grad)
            return grad, torch.where(padding, float("nan"), torch.zeros(len(grad), 2, 8)), grad[:, ::2]

    grid = build_grid(GridSizes(dp_shard=8))
    packed_seq, _ = build_packed_seq(np.array([5, 8, 0]), np.array([8, 8, 4]))
    padding = torch.from_numpy(packed_seq.padding(cp_size=1, cp_rank=0))[:, None, None]
    assert padding.flatten().tolist() == [False] * 5 + [True] * 3 + [False] * 8 + [True] * 4
    attention = TEAttention("p2p", None)
    monkeypatch.setattr(attention, "_module", lambda *_: lambda q, k, v, **told: Careless.apply(q, k, v))
    q, k, v = (torch.randn(20, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = attention(q, k, v, packed_seq, grid.group("cp"))
    assert torch.equal(out, (q + v.repeat_interleave(2, 1)).masked_fill(padding, 0))
    out.backward(torch.ones_like(out))
    for x in (q, k, v):
        assert x.grad is not None and x.grad.isfinite().all() and not x.grad[padding[:, 0, 0]].any()


def test_long_rows_are_rotated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's offsets are 32 bits wide: with a border moved down here, every part is below it and the whole is the
    same.
    """
    from model import te_layers

    sizes = []

    def fused(x, angles, **_):
        assert len(x) == len(angles)
        sizes.append(len(x))
        return x * angles.unsqueeze(-1) if angles.ndim == 3 else x * angles[..., : x.shape[-1]]

    monkeypatch.setattr(te_layers.te_rope, "apply_rotary_pos_emb", fused)
    x, angles = torch.randn(50, 2, 3, 8)[:, :, 1:], torch.randn(50, 1, 1, 8)
    whole = te_layers.apply_rotary(x, angles)
    assert sizes == [50]
    monkeypatch.setattr(te_layers, "LARGEST_OFFSET", 48 * 12)
    assert torch.equal(te_layers.apply_rotary(x, angles), whole)
    assert sizes[1:] == [12, 12, 12, 12, 2]
