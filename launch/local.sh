#!/usr/bin/env bash
# Start a run on one node: launch/local.sh RANKS [train.py flags], such as
#
#   launch/local.sh 8 --config configs/gpt_1b.yaml --data-path corpus.jsonl
#
# PENTAGRID_TORCHRUN_RESTARTS: how often torchrun restarts the ranks when one fails, 0 if unset; with --resume they continue from the
#   newest checkpoint.
# PENTAGRID_BIN: folder of python and torchrun, .venv/bin if unset.
# PENTAGRID_LOG_DIR: folder that also gets every rank's output.
#
# The last line and the exit code are the run's (launch/torchrun.py): 0 done or stopped, 2 refused, 1 failed, 128 + N after signal N.
# The rendezvous is torchrun's static one, on a free port. That of --standalone unpickles what any local user writes into its store.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() {
    echo "launch/local.sh: $1; usage: launch/local.sh RANKS [train.py flags]" >&2
    exit 2
}
[ $# -ge 1 ] || usage "no number of ranks"
[[ $1 =~ ^[1-9][0-9]*$ ]] || usage "RANKS is $1, not a number above 0"
ranks=$1
shift
restarts=${PENTAGRID_TORCHRUN_RESTARTS:-0}
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || usage "PENTAGRID_TORCHRUN_RESTARTS is $restarts, not a number"
bin=${PENTAGRID_BIN:-.venv/bin}
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-${PENTAGRID_INTERFACE:-lo}}"
. launch/env.sh
logs=()
if [ -n "${PENTAGRID_LOG_DIR:-}" ]; then
    logs=(--log-dir "$PENTAGRID_LOG_DIR" --redirects 3 --tee 3 --local-ranks-filter 0)
fi
exec "$bin/python" -m launch.torchrun --nnodes 1 --node-rank 0 --nproc-per-node "$ranks" --max-restarts "$restarts" \
    --rdzv-backend static --master-addr 127.0.0.1 ${logs[@]+"${logs[@]}"} train.py "$@"
