# shellcheck shell=bash
# Environment of a run, sourced by the scripts of this folder. `ranks`: number of ranks on this node. A variable that is set stays unchanged.
# Each line states its reason; at the end are variables that are left alone. Sources: docs/launch.md.

# CPU threads of a rank. torchrun sets 1, with which data preparation and saving are slow on a node of many cores.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc) / ${ranks:?how many ranks this node has}))
    export OMP_NUM_THREADS=$((threads < 1 ? 1 : threads > 8 ? 8 : threads))
fi

# Packed rows give activations of changing sizes: expandable segments keep the CUDA allocator from fragmenting.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# Seconds from torchrun's SIGTERM to its SIGKILL; the default of 30 is short for a checkpoint. PyTorch before pytorch/pytorch#172596
# (March 2026) ignores the variable. SLURM kills a job KillWait seconds after its SIGTERM, whatever the variable says.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"

# Open files: torchrun on the first node, and rank 0 in a gather, have connections to all ranks; the usual limit is 1024.
ulimit -Sn "$(ulimit -Hn)"

# Python writes to a log file in blocks: without this the last lines of a killed rank are lost.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# Exact name of the network interface that the nodes share. Without it gloo takes the address of this host's name, which many
# /etc/hosts map to the loopback, and NCCL chooses an interface.
if [ -n "${PENTAGRID_INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$PENTAGRID_INTERFACE}"
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$PENTAGRID_INTERFACE}"
fi

# Left alone:
#   CUDA_DEVICE_MAX_CONNECTIONS    1 lets collectives of tensor parallelism overlap with GEMMs, as TE's warning says; but 1 puts FSDP's
#                                  gathers and the ring's sends into the same queue. Try 1 with --tp-size and nothing sharded.
#   TORCH_NCCL_ASYNC_ERROR_HANDLING  the default, 3, ends the process on an NCCL error, as wanted.
#   TORCH_FR_BUFFER_SIZE, TORCH_NCCL_DUMP_ON_TIMEOUT  the flight recorder is on, but writes when a collective times out; train.py's
#                                  watchdog ends the run earlier and names the rank.
#   NCCL_NVLS_ENABLE               NCCL detects NVLink SHARP. Set 0 when memory is short, or after "Failed to bind NVLink SHARP".
#   NVTE_FLASH_ATTN, NVTE_FUSED_ATTN  TE chooses its kernels; --cp-backend chooses TE's attention.
#   NVTE_ALLOW_NONDETERMINISTIC_ALGO  0 for runs on GPUs that repeat to the bit; slower backward passes.
#   NCCL_IB_HCA, NCCL_NET and others  belong to the cluster: its administrators set them in /etc/nccl.conf.
