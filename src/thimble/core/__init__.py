"""Mathematics of low-rank updates on numpy: no files, no framework."""
