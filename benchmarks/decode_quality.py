"""What rounding to int8 changes while answers are written: perplexity and KL against float, on general text.

    python benchmarks/decode_quality.py [--base FILE.gguf] [--windows 16] [--window 256] [--of decode]

Rounded are activations (`--decode int8`), or keys and values (`--cache-type int8`) with `--of cache_type`. Windows are
read as an answer is written, 16 tokens a step, with the file's own blocks in both ways.
"""

import argparse

import numpy as np
from numpy.typing import NDArray

from thimble.backends.open import open_session
from thimble.backends.session import ForwardRow, Pass, Session
from thimble.data.model import open_model
from thimble.data.records import general_records

STEP = 16


def log_probabilities(session: Session, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """Of the next token after each of some tokens: float64 (T, vocabulary)."""
    cache, base = session.new_cache(), session.load(None)
    blocks = tuple(range(-(-len(ids) // cache.block_tokens)))
    cache.reserve(len(blocks))
    parts = []
    for place in range(0, len(ids), STEP):
        some = ids[place : place + STEP]
        row = ForwardRow(len(some), blocks, place, len(ids), base, is_written=True)
        [(logits, _)] = session.forward([Pass(some, [row], range(len(some)))], cache, 1)
        parts.append(logits.astype(np.float64))
    logits = np.concatenate(parts)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def main() -> None:
    """Print a line a window, then the means with their standard errors over windows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--of", default="decode", choices=["decode", "cache_type"])
    given = parser.parse_args()
    model, size = open_model(given.base), given.window
    ways = [open_session(model, "fp32", "file", **{given.of: way}) for way in ("float", "int8")]
    text = "\n\n".join(
        record.text or "\n".join(message["content"] for message in record.messages or ())
        for record in general_records()
    )
    ids = np.array(model.tokenizer.encode(text), np.int32)
    rises, divergences = [], []
    for number in range(min(given.windows, len(ids) // size)):
        window = ids[number * size : (number + 1) * size]
        exact, rounded = (log_probabilities(session, window)[:-1] for session in ways)
        places = np.arange(size - 1), window[1:]
        rises.append(float((exact[places] - rounded[places]).mean()))
        divergences.append(float((np.exp(exact) * (exact - rounded)).sum(-1).mean()))
        print(f"window {number + 1}: perplexity {np.expm1(rises[-1]):+.2%}, KL {divergences[-1]:.4f}", flush=True)
    error = np.std(rises, ddof=1) / np.sqrt(len(rises))
    print(
        f"{len(rises) * size} tokens: perplexity {np.expm1(np.mean(rises)):+.2%} (standard error {error:.2%}), ",
        end="",
    )
    print(f"KL {np.mean(divergences):.4f}")


if __name__ == "__main__":
    main()
