"""The PyTorch engine: frozen weights read as they lie in the file, adapters trained beside them."""

from thimble.models.machine import prepare_threads

prepare_threads()
