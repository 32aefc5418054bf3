"""Processes, ranks and how a run ends."""
