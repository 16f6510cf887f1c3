"""llama.cpp as its users run it, in this process: the package xllamacpp brings the real llama-server.

Only what a proof needs: log-probabilities of given tokens, and an answer. Floats are kept as floats and flash attention
is off, so that what differs from ours is arithmetic and not another choice.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from thimble.errors import MissingPackageError, install_line

FORCING = 10_000.0  # added to the logit of the next token, so that it is the one that is written


def is_installed() -> bool:
    """Whether a proof can be made here."""
    import importlib.util

    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """One base with at most one adapter, loaded by llama.cpp."""

    def __init__(
        self, base: Path, adapter: Path | None = None, threads: int = 1, context: int = 512, has_template: bool = False
    ) -> None:
        """Load both, and the chat template if it is asked for.

        A MissingPackageError without the package, a RuntimeError if llama.cpp refuses a file.
        """
        try:
            import xllamacpp
        except ImportError:
            raise MissingPackageError(
                f"a proof in llama.cpp needs the package xllamacpp: {install_line('llamacpp')}"
            ) from None
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(base), context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.n_gpu_layers, params.warmup, params.verbosity = 0, False, 0
        params.swa_full = True  # a cut cache loses what a window still sees
        params.enable_chat_template = params.use_jinja = has_template
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def log_probabilities(self, ids: Sequence[int], begin: int) -> Iterator[float]:
        """Natural log-probability of each token from `begin` (at least 1) on, given those before it; NaN if not told.

        The server tells only what it writes, so each token is forced and its probability before that is asked for. It
        tells nothing of a token that is no whole character.
        """
        for place in range(begin, len(ids)):
            told = self._complete(ids[:place], n_predict=1, n_probs=1, logit_bias=[[ids[place], FORCING]])
            found = (told["choices"][0]["logprobs"] or {}).get("content") or [{"id": ids[place], "logprob": math.nan}]
            if found[0]["id"] != ids[place]:
                raise RuntimeError(f"llama.cpp wrote token {found[0]['id']} where {ids[place]} was forced")
            yield float(found[0]["logprob"])

    def answer(self, ids: Sequence[int], most: int) -> tuple[str, bool]:
        """The greedy answer to some tokens, and whether it ended by itself."""
        choice = self._complete(ids, n_predict=most)["choices"][0]
        return choice["text"], choice["finish_reason"] == "stop"

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, with marks like `<|im_end|>` as tokens and without bos."""
        return list(self._post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"])

    def apply_template(self, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> str:
        """A conversation as the chat template writes it, up to where an answer begins."""
        return str(self._post("/apply-template", messages=messages, **({"tools": tools} if tools else {}))["prompt"])

    def _post(self, path: str, **asked: Any) -> dict[str, Any]:
        import json
        from urllib.error import HTTPError
        from urllib.request import Request, urlopen

        body, kind = json.dumps(asked).encode(), {"Content-Type": "application/json"}
        try:  # its server listens on this machine alone
            with urlopen(Request(self._server.listening_address + path, body, kind)) as told:
                answer: dict[str, Any] = json.load(told)
                return answer
        except HTTPError as error:
            raise RuntimeError(f"llama.cpp answers {error.read().decode(errors='replace')[:200]}") from None

    def _complete(self, ids: Sequence[int], **options: Any) -> dict[str, Any]:
        told = self._server.handle_completions({"prompt": list(ids), "temperature": 0, "cache_prompt": True, **options})
        if not isinstance(told, dict) or "choices" not in told:
            raise RuntimeError(f"llama.cpp answers {str(told)[:200]}")
        return told
