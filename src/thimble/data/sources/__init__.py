"""Files of examples: which of them are read, and their rows as they stand in them."""
