"""Checkpoints: files, saving, loading, resuming."""
