"""Flags: their groups, how they are parsed, what is refused."""
