"""Rows of pictures, prompts and answers, from the files that people have."""
