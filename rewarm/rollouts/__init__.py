"""From prompts to scored completions: generation engines, sampling, rewards."""
