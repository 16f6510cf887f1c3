"""`thimble chat`: talk to a base or an adapter, and switch between them while talking."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from thimble.backends.open import choose_store, open_session
from thimble.config.options import ChatConfig
from thimble.core.adapter import Adapter
from thimble.data.encode import Encoder
from thimble.data.model import Model, open_model
from thimble.errors import AdapterError, Problems, listing
from thimble.events import EventLog, OnEvent, ignore
from thimble.models.adapters import open_adapters
from thimble.models.execution import ExecutionPlan

if TYPE_CHECKING:
    from thimble.backends.torch.session import TorchSession

OnText = Callable[[str], bool | None]
BASE_NAME = "base"


class Conversation:
    """A model one can talk to; holds the turns so far.

    Args:
        config: The options.
        model: The opened base.
        session: The base in memory.
        adapters: Adapters by name; `base` is always there and means none.
    """

    def __init__(self, config: ChatConfig, model: Model, session: "TorchSession", adapters: dict[str, Adapter]) -> None:
        self._config, self._model, self._session = config, model, session
        self._encoder = Encoder(
            model.tokenizer, model.template, model.base.spec.max_positions, vocab_size=model.base.spec.vocab_size
        )
        self._adapters: dict[str, Adapter | None] = {BASE_NAME: None, **adapters}
        self._turns_taken = 0
        self.active = BASE_NAME
        self.messages: list[dict[str, Any]] = []
        self.reset()
        self.use(next(reversed(self._adapters)))

    @property
    def names(self) -> list[str]:
        """What `use` takes."""
        return list(self._adapters)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self._config.system}] if self._config.system else []

    def use(self, name: str) -> None:
        """Switch to an adapter, or to `base`; the conversation goes on.

        Args:
            name: One of `names`.

        Raises:
            AdapterError: If there is no adapter of that name.
        """
        if name not in self._adapters:
            raise AdapterError(f"there is no adapter {name!r} here: choose from {listing(self.names)}")
        self.active = name
        self._session.attach(self._adapters[name])

    def ask(self, text: str, on_text: OnText = lambda piece: None) -> str:
        """Say something and hear the answer.

        Args:
            text: The user's turn.
            on_text: Hears the answer piece by piece; returning True stops it.

        Returns:
            The whole answer.
        """
        self.messages.append({"role": "user", "content": text})
        tokenizer, config = self._model.tokenizer, self._config
        prompt = self._encoder.prompt(self.messages)
        written: list[int] = []
        shown = ""

        def hear(row: int, token: int) -> bool | None:
            nonlocal shown
            written.append(token)
            whole = tokenizer.decode(written, skip_special=True)
            if whole.endswith("\ufffd"):  # in the middle of a character
                return None
            piece, shown = whole[len(shown) :], whole
            return on_text(piece)

        self._turns_taken += 1
        self._session.generate(
            [prompt], config.max_new_tokens, tokenizer.stop_ids, hear,
            temperature=config.temperature, top_p=config.top_p, seed=config.seed + self._turns_taken - 1,
        )  # fmt: skip
        answer = tokenizer.decode(written, skip_special=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def open_conversation(config: ChatConfig, on_event: OnEvent = ignore) -> Conversation:
    """Open a base with adapters to talk to.

    Args:
        config: The options.
        on_event: Hears what was decided.

    Returns:
        The conversation, with the last adapter in use.

    Raises:
        InputError: With every problem found.
    """
    from thimble.backends.torch.compute import choose_compute
    from thimble.backends.torch.threads import num_cores

    log = EventLog(on_event)
    problems = Problems(config.problems)
    model = problems.attempt(open_model, config.base)
    adapters = open_adapters(config.adapter, model.base if model else None, problems)
    (model,) = problems.required(model)
    compute, why = choose_compute(config.compute)
    log.decision(f"compute: {why}")
    session = open_session(
        model, compute, ExecutionPlan(choose_store(config.store, model.base, compute)[0][0], num_cores())
    )
    return Conversation(config, model, session, adapters)
