"""`thimble generate` on many short prompts against a bare loop over its engine, alternating; wall and processor time.

Both sides are processes of their own on the default base, with the same prompts, greedy answers and their start-up:
`python benchmarks/generate.py --prompts 1000 --max-new-tokens 8 --rounds 2`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOPICS = ("the parcel", "my invoice", "the login", "a refund", "the manual", "my order", "the app", "a voucher")


def write_prompts(path: Path, count: int) -> None:
    """Short prompts, none like another."""
    rows = ({"prompt": f"Ticket {n}: what about {TOPICS[n % 8]} of day {n % 31 + 1}?"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bare(path: Path, max_new_tokens: int) -> None:
    """Read, encode and answer every prompt with the engine alone; writes the answers as texts."""
    from thimble.backends.open import choose_store, open_session
    from thimble.backends.torch.compute import choose_compute
    from thimble.backends.torch.threads import num_cores
    from thimble.data.encode import Encoder
    from thimble.data.model import open_model
    from thimble.inference.batch import Request, answer_all
    from thimble.inference.engine import Engine
    from thimble.inference.sampling import SamplingOptions

    model = open_model(None)
    encoder = Encoder(model.tokenizer, model.template, model.base.spec.max_positions)
    asked = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    prompts = [encoder.prompt([{"role": "user", "content": text}]) for text in asked]
    compute, _ = choose_compute("auto")
    session = open_session(model, compute, choose_store("auto", model.base, compute)[0][0])
    engine = Engine(session, num_cores(), is_interactive=False)
    options = SamplingOptions(max_new_tokens, model.tokenizer.stop_ids)
    requests = (Request(key, prompt, options) for key, prompt in enumerate(prompts))
    ended = [each for step in answer_all(engine, requests, session.load(None)) for each in step]
    texts = [model.tokenizer.decode(each.ids, skip_special=True) for each in sorted(ended)]
    Path(f"{path}.bare").write_text("\n".join(texts))
    print(json.dumps({"tokens": sum(len(each.ids) for each in ended)}))


def timed(words: list[str]) -> tuple[float, float, dict]:
    """Run a process; gives its seconds, its processor seconds, and the JSON object it prints."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, json.loads(done.stdout)


def main() -> None:
    """Alternate the two and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        return bare(given.bare, given.max_new_tokens)
    thimble, rounds = os.path.join(os.path.dirname(sys.executable), "thimble"), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        write_prompts(path, given.prompts)
        most = ["--max-new-tokens", str(given.max_new_tokens)]
        for number in range(given.rounds):
            wall, processor, report = timed([sys.executable, __file__, *most, "--bare", str(path)])
            out = ["--out", f"{folder}/answers-{number}.jsonl"]
            our_wall, our_processor, ours = timed([thimble, "generate", str(path), *out, *most, "--json"])
            rate, our_rate = report["tokens"] / wall, ours["completion_tokens"] / our_wall
            rounds.append((our_rate / rate, processor / our_processor))
            print(f"bare {rate:.1f} tokens/s, {processor:.0f} s of processor; ", end="")
            print(f"generate {our_rate:.1f} tokens/s, {our_processor:.0f} s of processor", flush=True)
    walls, processors = zip(*rounds, strict=True)
    print(f"generate over bare: {statistics.median(walls):.2f} by the clock, ", end="")
    print(f"{statistics.median(processors):.2f} by processor time")


if __name__ == "__main__":
    main()
