"""Scores of difficulty for the examples of a data set: what `rewarm score` runs on."""
