"""Sizes in which the engine works, each the best of a race; the memory plan counts with them too."""

# Numbers and rows of a frozen matrix multiplied at once where it is decoded, and when gradients go back through it:
# many enough for a fast product, few enough for the cache.
WINDOW, WINDOW_ROWS, WINDOW_STEP = 8 << 20, 4096, 256

# The libraries keep a compiled product for every new size, a megabyte each: so tokens come in multiples of this.
PADDED_TOKENS = 64

# Tokens with a label, which alone run through the end of the last block, come in multiples of this.
PADDED_LABELS = 256

# Queries in one product of attention, and what queries and keys are padded to.
TILE, PADDED_QUERIES, PADDED_KEYS = 256, 64, 128

LOGIT_CHUNK_BYTES = 64_000_000  # most logits alive at once on each core
TABLES_COMPARED = 3  # of logits, float32, while two models are compared

BUFFER_TOKENS = 128  # buffers that are used again grow in steps of so many rows

# Second moments of a module's inputs that are held at a time: for the next layers the batches run again.
MOMENT_BYTES = 256_000_000

# In a micro-batch; the first is the fastest.
MICRO_BATCH_TOKENS = (1024, 512)


def windows(rows: int, cols: int) -> list[slice]:
    """Cut the rows of a matrix into stretches of at most `WINDOW_ROWS` and about `WINDOW` numbers."""
    size = max(WINDOW_STEP, min(WINDOW_ROWS, WINDOW // cols // WINDOW_STEP * WINDOW_STEP))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def padded(tokens: int) -> int:
    """Tokens of a batch after padding."""
    side = PADDED_TOKENS if tokens > PADDED_TOKENS else 8
    return -(-tokens // side) * side


def logit_chunk(rows: int, row_bytes: int) -> int:
    """Rows whose logits are made at once: all, or an equal share of them that keeps to `LOGIT_CHUNK_BYTES`."""
    count = max(1, -(-rows * row_bytes // LOGIT_CHUNK_BYTES))
    return padded(max(1, -(-rows // count)))
