# Environment of a multi-GPU run; source it before torchrun. Nothing in the suite reads these but the libraries.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
