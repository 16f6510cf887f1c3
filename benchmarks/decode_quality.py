"""What rounding activations to int8 changes while answers are written: perplexity and KL against float, general text.

    python benchmarks/decode_quality.py [--base FILE.gguf] [--windows 16]

Windows of 256 tokens are read as an answer is written, 16 tokens a step, with the file's own blocks in both ways.
"""

import argparse

import numpy as np
from numpy.typing import NDArray

from thimble.backends.open import open_session
from thimble.backends.session import ForwardRow, Pass, Session
from thimble.data.model import open_model
from thimble.data.records import general_records

WINDOW, STEP = 256, 16


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
    given = parser.parse_args()
    model = open_model(given.base)
    ways = {decode: open_session(model, "fp32", "file", decode=decode) for decode in ("float", "int8")}
    text = "\n\n".join(
        record.text or "\n".join(message["content"] for message in record.messages or ())
        for record in general_records()
    )
    ids = np.array(model.tokenizer.encode(text), np.int32)
    rises, divergences = [], []
    for number in range(min(given.windows, len(ids) // WINDOW)):
        window = ids[number * WINDOW : (number + 1) * WINDOW]
        exact, rounded = (log_probabilities(session, window)[:-1] for session in ways.values())
        places = np.arange(WINDOW - 1), window[1:]
        rises.append(float((exact[places] - rounded[places]).mean()))
        divergences.append(float((np.exp(exact) * (exact - rounded)).sum(-1).mean()))
        print(f"window {number + 1}: perplexity {np.expm1(rises[-1]):+.2%}, KL {divergences[-1]:.4f}", flush=True)
    error = np.std(rises, ddof=1) / np.sqrt(len(rises))
    print(
        f"{len(rises) * WINDOW} tokens: perplexity {np.expm1(np.mean(rises)):+.2%} (standard error {error:.2%}), ",
        end="",
    )
    print(f"KL {np.mean(divergences):.4f}")


if __name__ == "__main__":
    main()
