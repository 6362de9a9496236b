"""PaliGemma 1 and 2 from scratch in PyTorch."""
