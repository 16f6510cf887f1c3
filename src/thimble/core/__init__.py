"""Numpy-only heart of Thimble: files, low-rank maths, knobs and figures; knows no framework."""
