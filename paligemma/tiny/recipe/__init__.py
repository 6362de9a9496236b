"""The recipe of the model that ships, from the tokenizer to the last step of training."""
