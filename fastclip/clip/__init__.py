"""A thin reference CLIP: towers, tokenizer, zero-shot classification."""
