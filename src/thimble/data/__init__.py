"""From a folder of examples to token ids and labels: sources, rows, templates, tokenizers, encoding, batches."""
