"""Process groups and what communicates over them. Imports torch only."""
