"""Our methods against TRL and bare PyTorch loops, on the same work in the same run."""
