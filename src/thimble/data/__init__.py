"""From a folder of examples to token ids with a loss mask; knows no framework and no model."""
