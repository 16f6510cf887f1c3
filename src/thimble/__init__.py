"""Thimble: fine-tune language models with LoRA on the machine you have."""

__version__ = "0.1.0"
