"""Formats on disk: safetensors, GGUF, PEFT's adapter folder, block codecs, atomic writes, untrusted input."""
