#!/usr/bin/env bash
# Start a run on several nodes without SLURM: launch/multi_node.sh NODE_RANK NNODES HEAD:PORT RANKS [train.py flags], once on every
# node, such as
#
#   node0$ launch/multi_node.sh 0 2 node0:29400 8 --config configs/gpt_1b.yaml --run-dir runs/one --resume
#   node1$ launch/multi_node.sh 1 2 node0:29400 8 --config configs/gpt_1b.yaml --run-dir runs/one --resume
#
# NODE_RANK: number of this node from 0; node 0 is HEAD. RANKS: ranks of this node, the same number on all nodes. The nodes start in any
# order, within ten minutes. The repository is at the same path on all nodes; --run-dir and --data-cache-path are on a shared file system.
#
# PENTAGRID_BIN: folder of python and torchrun, .venv/bin if unset.
# PENTAGRID_INTERFACE: network interface to use, if other nodes cannot reach this node under its host name.
# PENTAGRID_LOG_DIR: folder that also gets every rank's output.
#
# The rendezvous is torchrun's static one. Ranks are numbered as the nodes are, so rank 0, which writes metrics and status.json and watches
# the stop file, is on HEAD. One port is open. No node must recognise HEAD's name as its own, as c10d requires. A run of fixed layout cannot
# use what c10d adds: nodes that join and leave.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() {
    echo "launch/multi_node.sh: $1; usage: launch/multi_node.sh NODE_RANK NNODES HEAD:PORT RANKS [train.py flags]" >&2
    exit 2
}
[ $# -ge 4 ] || usage "$# arguments"
node_rank=$1 nnodes=$2 head=$3 ranks=$4
shift 4
for number in "$node_rank" "$nnodes" "$ranks"; do # bash computes with 010 as 8, and not with 08
    [[ $number =~ ^(0|[1-9][0-9]*)$ ]] || usage "$number is not a number, or begins with 0"
done
[ "$ranks" != 0 ] || usage "RANKS is 0"
[ "$node_rank" -lt "$nnodes" ] || usage "NODE_RANK is $node_rank, but with NNODES $nnodes the last one is $((nnodes - 1))"
[[ $head =~ ^(.+):([1-9][0-9]*)$ ]] || usage "$head is not HEAD:PORT"
address=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
if [ -n "${PENTAGRID_INTERFACE:-}" ] && [ ! -e "/sys/class/net/$PENTAGRID_INTERFACE" ]; then
    present=$(cd /sys/class/net && echo *)
    usage "PENTAGRID_INTERFACE is $PENTAGRID_INTERFACE, but this node has $present"
fi
. launch/env.sh
logs=()
if [ -n "${PENTAGRID_LOG_DIR:-}" ]; then
    logs=(--log-dir "$PENTAGRID_LOG_DIR/node$node_rank" --redirects 3 --tee 3 --local-ranks-filter 0)
fi
exec "${PENTAGRID_BIN:-.venv/bin}/torchrun" --nnodes "$nnodes" --node-rank "$node_rank" --nproc-per-node "$ranks" \
    --rdzv-backend static --master-addr "$address" --master-port "$port" ${logs[@]+"${logs[@]}"} train.py "$@"
