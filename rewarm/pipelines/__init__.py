"""Stages in a row, each a process of its own, and the report on them: what `rewarm run` runs on."""
