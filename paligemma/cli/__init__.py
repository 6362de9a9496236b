"""The command `paligemma`."""
