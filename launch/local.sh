#!/usr/bin/env bash
# One node: launch/local.sh 8 --config configs/gpt_1b.yaml --data-path corpus.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: launch/local.sh RANKS [train.py flags]" >&2; exit 2; }
ranks=$1
shift
. launch/env.sh
exec .venv/bin/torchrun --standalone --nproc-per-node "$ranks" train.py "$@"
