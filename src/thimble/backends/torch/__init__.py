"""The PyTorch engine: frozen weights read as they lie in the file, adapters trained beside them."""

import os

# torch's OpenMP threads spin while they wait, which on a machine that does other work too costs far more than it saves,
# and steals the cores of our own threads. Read once, when torch is loaded; a user's own setting is kept.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
