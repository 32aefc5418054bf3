"""Peak memory of tools/convert_hf.py on a synthetic model, in each direction.

    python benchmarks/convert_hf.py [--hidden 2048] [--layers 6] [--vocabulary 57344] [--shard-size 0.6] [--json FILE]

The defaults make a model of 2 GiB in fp32. A figure is what the peak of the process adds to its memory after imports,
over 1.3 times the largest tensor plus the largest file of weights: the goal is at most 1. A missed goal does not fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from data.tokenizer import ByteTokenizer
from model.config import count_parameters
from tools.hf.config import read_config
from tools.hf.tokenizer import write_tokenizer
from tools.hf.weights import INDEX_FILE, list_weights
from utils.errors import OneLineParser, run_tool

ROOT = Path(__file__).resolve().parents[1]
# Run in a process of its own: the conversion, with the peak before and after, in KiB.
CHILD = """
import re, sys
sys.path.insert(0, ".")
from tools import convert_hf
import torch.distributed.checkpoint, yaml
# getrusage's peak is the parent's too.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
convert_hf.main(sys.argv[1:])
print(before, peak())
"""


@dataclass(frozen=True)
class Peak:
    """Bytes: added by the conversion, of the largest tensor, of the largest file of weights."""

    added: int
    tensor: int
    shard: int

    @property
    def ratio(self) -> float:
        return self.added / (1.3 * self.tensor + self.shard)


def write_model(folder: Path, *, hidden: int, layers: int, vocabulary: int, shard_bytes: int) -> int:
    """Write a Llama of fp32 weights, a file at a time. Return the bytes of our largest tensor."""
    said = dict(
        model_type="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=2048,
        eos_token_id=256,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(said))
    for name, content in write_tokenizer(ByteTokenizer(), max_positions=2048, keep_template=False).items():
        (folder / name).write_text(content)
    config = read_config(said, "config.json")
    where: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    parts = [part for weight in list_weights(config) for part in weight.parts]
    for number, (name, shape) in enumerate(parts):
        tensors[name] = torch.ones(shape)
        following = parts[number + 1][1] if number + 1 < len(parts) else (shard_bytes,)
        if sum(x.nbytes for x in tensors.values()) + 4 * torch.Size(following).numel() > shard_bytes:
            file = f"model-{len(set(where.values())):05d}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
            tensors = {}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": where}))
    print(f"{count_parameters(config) * 4 / 2**30:.2f} GiB in {len(set(where.values()))} files")
    return max(4 * torch.Size(weight.shape).numel() for weight in list_weights(config))


def measure(folder: Path, *, shard_size: float, tensor: int) -> dict[str, Peak]:
    """Import the model in `folder`/hf, then export it. `tensor`: bytes of our largest."""
    found = {}
    for name, source, words in (
        ("import", "hf", ["import", "--input", "hf", "--output", "run"]),
        ("export", "back", ["export", "--load", "run", "--output", "back", "--shard-size", str(shard_size)]),
    ):
        paths = [str(folder / word) if word in ("hf", "run", "back") else word for word in words]
        child = subprocess.run([sys.executable, "-c", CHILD, *paths], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        before, after = map(int, child.stdout.decode().splitlines()[-1].split())
        shard = max(path.stat().st_size for path in (folder / source).glob("*.safetensors"))
        found[name] = Peak((after - before) * 1024, tensor, shard)
    return found


def main(argv: list[str]) -> int:
    parser = OneLineParser(description=__doc__)
    for flag, default in (("--hidden", 2048), ("--layers", 6), ("--vocabulary", 57344)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--shard-size", type=float, default=0.6, help="largest file of weights, in 10^9 bytes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    shape = dict(hidden=args.hidden, layers=args.layers, vocabulary=args.vocabulary)
    with tempfile.TemporaryDirectory(prefix="convert-") as scratch:
        folder = Path(scratch)
        tensor = write_model(folder / "hf", **shape, shard_bytes=int(args.shard_size * 1e9))
        peaks = measure(folder, shard_size=args.shard_size, tensor=tensor)
    for name, peak in peaks.items():
        sizes = (
            f"{peak.added / 2**20:,.0f} MiB, largest tensor {peak.tensor / 2**20:,.0f}, file {peak.shard / 2**20:,.0f}"
        )
        print(f"{name}: {sizes}: {peak.ratio:.2f} of the limit")
    if args.json:
        args.json.write_text(json.dumps(shape | {name: vars(peak) for name, peak in peaks.items()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
