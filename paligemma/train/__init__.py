"""Fine-tuning: a model, a processor and rows of (image, prefix, suffix) -> a better model."""
