"""Text in and text out: file formats, tokenisation, generation engines, reward functions."""
