"""What an answer means: boxes and masks out of tokens, drawn, and written for other tools."""
