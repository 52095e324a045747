"""Ours against others on the same work, in one run; results in RESULTS.md."""
