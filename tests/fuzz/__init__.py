"""Mutated files for every reader."""
