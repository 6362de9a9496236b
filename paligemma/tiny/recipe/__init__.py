"""The recipe of the model that ships, from the tokenizer to the packaged checkpoint."""
