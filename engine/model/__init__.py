"""The model: its files, configuration and weights, the tokenizer, and the decoder that computes logits."""
