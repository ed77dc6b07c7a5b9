"""What turns weights into logits and text into tokens: model files, configuration, weights, decoder, tokenizer."""
