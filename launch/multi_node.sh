#!/usr/bin/env bash
# Several nodes without SLURM: launch/multi_node.sh NODE_RANK NNODES HEAD:PORT RANKS [train.py flags], once on every node, as in
#
#   node0$ launch/multi_node.sh 0 2 node0:29400 8 --config configs/gpt_1b.yaml --run-dir runs/one --resume
#   node1$ launch/multi_node.sh 1 2 node0:29400 8 --config configs/gpt_1b.yaml --run-dir runs/one --resume
#
# NODE_RANK counts from 0, which is HEAD; RANKS are those of this node, the same number on all. The nodes may start in any order, within
# ten minutes. The repository lies at the same place on all, --run-dir and --data-cache-path on a file system that they share.
#
# PENTAGRID_BIN: folder of python and torchrun, .venv/bin if unset. PENTAGRID_INTERFACE: the network interface to use, if another node
# cannot reach this one under its host name. PENTAGRID_LOG_DIR: every rank's output also goes to files under it.
#
# The rendezvous is torchrun's static one: the ranks are numbered as the nodes are, so that rank 0, which writes metrics and status.json and
# looks for the stop file, is on HEAD; there is one port to open; and no node is asked for its own name, as c10d does to find out which of
# them is HEAD. What c10d has beyond that, nodes that come and go, a run of fixed layout cannot use.
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
