"""What turns text into tokens and weights into logits: files, configuration, weights, decoder, tokenizer."""
