"""Numpy-only heart of Thimble: files, low-rank maths, options and figures; knows no framework."""
