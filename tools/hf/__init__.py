"""Model folders of Hugging Face: configuration, weights and tokenizer, both ways (tools/convert_hf.py)."""
