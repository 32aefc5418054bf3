"""The GPT model: configuration, layers, loss."""
