"""What a run reports: log, TensorBoard, timers, banner, profiler."""
