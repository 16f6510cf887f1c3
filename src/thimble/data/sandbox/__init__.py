"""Where a chat template runs: it can reach nothing, and everything it does is paid for."""
