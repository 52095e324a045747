"""What the papers say, tried at toy size: one script per claim, several seeds, results in `results/`."""
