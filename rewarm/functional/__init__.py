"""Pure functions on tensors and numbers. Imports torch and the standard library only.

Shapes, one legend for the whole project:

**B** sequences (or rows of a batch), **T** token positions, **V** vocabulary, **D** hidden size, **P**
preference pairs, **Q** prompts, **G** completions per prompt (B = Q * G), **N** items in a flat list (tokens,
examples), **K** checkpoints.
"""
