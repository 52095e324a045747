"""The commands: a file for each, of its name."""
