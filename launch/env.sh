# shellcheck shell=bash
# The environment of a run, sourced by the other scripts here; `ranks` is how many this node has. What is already set stays as it is.
# Every line has a reason; below them is what is left alone on purpose. docs/launch.md has the sources.

# Threads of a rank on the CPU. torchrun would set 1, which makes preparing data and saving on a node of many cores slow.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc) / ${ranks:?how many ranks this node has}))
    export OMP_NUM_THREADS=$((threads < 1 ? 1 : threads > 8 ? 8 : threads))
fi

# Packed rows make activations of ever other sizes: segments that grow keep the CUDA allocator from splitting memory beyond use.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# Seconds that torchrun leaves its ranks between SIGTERM and SIGKILL; its own 30 are short for a checkpoint. A PyTorch from before
# pytorch/pytorch#172596 (March 2026) keeps to 30. SLURM ends a job KillWait seconds after its SIGTERM, whatever this says.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"

# A rank's log is a file, to which Python writes in blocks: the last lines of a rank that is killed would be lost.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# The network interface that the nodes share, by its exact name. Without one gloo takes the address of this host's name, which
# many /etc/hosts put on the loopback, and NCCL the first interface that it likes.
if [ -n "${PENTAGRID_INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$PENTAGRID_INTERFACE}"
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$PENTAGRID_INTERFACE}"
fi

# Left alone:
#   CUDA_DEVICE_MAX_CONNECTIONS    1 makes sure that tensor parallelism's collectives overlap with the products, as TE says in a warning; but it
#                                  puts FSDP's gathers and the ring's sends into the same queue. With --tp-size and nothing sharded, try it.
#   TORCH_NCCL_ASYNC_ERROR_HANDLING  its default, 3, ends the process on a NCCL error, which is what we want.
#   TORCH_FR_BUFFER_SIZE, TORCH_NCCL_DUMP_ON_TIMEOUT  the flight recorder is on, but writes when a collective times out, and train.py's
#                                  watchdog ends the run before that and names the rank that is waited for.
#   NCCL_NVLS_ENABLE               NCCL knows whether NVLink SHARP is there. 0 when memory is short, or after "Failed to bind NVLink SHARP".
#   NVTE_FLASH_ATTN, NVTE_FUSED_ATTN  TE chooses its kernels; --cp-backend chooses whether attention is TE's.
#   NVTE_ALLOW_NONDETERMINISTIC_ALGO  0 for runs on GPUs that repeat to the bit; slower backward passes.
#   NCCL_IB_HCA, NCCL_NET and the like  of the cluster: its administrators set them in /etc/nccl.conf.
