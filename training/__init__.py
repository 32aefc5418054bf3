"""Everything between the flags and the step: arguments, optimiser, checkpoints, metrics."""
