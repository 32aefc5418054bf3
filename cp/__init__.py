"""Context parallelism: who owns which token, and attention over the pieces."""
