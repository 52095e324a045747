"""LightningDataModules, and the samplers and loaders that own order and pacing."""
