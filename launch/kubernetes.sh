#!/usr/bin/env bash
# The command of a pod of launch/kubernetes.yaml: one node of a run. launch/kubernetes.sh NNODES HEAD:PORT RANKS [train.py flags]
#
# Starts launch/multi_node.sh as node $JOB_COMPLETION_INDEX, passes SIGTERM on, and ends with an exit code made from RUN_DIR/status.json:
#   0  all steps are trained
#   1  start all pods again: a stop that saved, a lost rank or pod
#   2  a new start would end as this one did: training failed, or train.py refused a flag or file
# --run-dir is required, and on a volume that all pods share.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
refuse() {
    echo "kubernetes.sh: $1" >&2
    exit 2
}
[ $# -ge 3 ] || refuse "usage: launch/kubernetes.sh NNODES HEAD:PORT RANKS [train.py flags]"
node=${JOB_COMPLETION_INDEX:?not in a pod of an Indexed Job}
nnodes=$1 head=$2 ranks=$3
shift 3
words=("$@") run_dir=""
for i in "${!words[@]}"; do
    case ${words[$i]} in
    --run-dir) run_dir=${words[$((i + 1))]-} ;;
    --run-dir=*) run_dir=${words[$i]#*=} ;;
    esac
done
[ -n "$run_dir" ] || refuse "give --run-dir, on the shared volume"

fact() { # NAME: value in status.json; empty without the file or the name
    [ ! -f "$run_dir/status.json" ] ||
        "${PENTAGRID_BIN:-.venv/bin}/python" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2], ""))' "$run_dir/status.json" "$1"
}

attempt_before=$(fact attempt)
launch/multi_node.sh "$node" "$nnodes" "$head" "$ranks" "$@" --resume &
child=$!
trap 'kill -TERM "$child"' TERM # bash as process 1 passes no signal on
code=0
while kill -0 "$child" 2>/dev/null; do wait "$child" && code=0 || code=$?; done
status=$(fact status)
echo "kubernetes.sh: node $node ended with $code at step $(fact step): $status $(fact reason)"
if [ "$(fact attempt)" = "$attempt_before" ]; then
    [ "$code" -ne 0 ] || exit 0 # --eval-only
    # Evicted before training began; or a pod was lost while the ranks started, after a start that trained with these flags.
    if [ "$code" -gt 128 ]; then exit 1; fi
    if [ "${JOBSET_RESTART_ATTEMPT:-0}" -gt 0 ] && [ -n "$attempt_before" ]; then exit 1; fi
    exit 2
fi
case $status in
done) exit 0 ;;
failed) [ "$(fact lost)" = True ] && exit 1 || exit 2 ;;
*) exit 1 ;;
esac
