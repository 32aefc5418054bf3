"""Memory, FLOPs and bytes of a step, before a run starts."""
