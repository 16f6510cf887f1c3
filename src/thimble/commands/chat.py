"""`thimble chat`: talk to a base or an adapter, and switch between them while talking."""

from collections.abc import Callable, Iterable

from thimble.backends.open import choose_decode, choose_store, open_session
from thimble.config.chat import ChatConfig
from thimble.data.encode import Encoder
from thimble.data.model import log_base, model_with_adapters
from thimble.data.run_columns import run_with_columns, turn_form, typed_columns
from thimble.errors import Problems
from thimble.events import EventLog, OnEvent, ignore
from thimble.inference.conversation import Conversation
from thimble.inference.sampling import SamplingOptions


def open_conversation(config: ChatConfig, on_event: OnEvent = ignore) -> Conversation:
    """Open a base with adapters to talk to; the last adapter is in use."""
    from thimble.backends.torch.compute import choose_compute

    log = EventLog(on_event)
    problems = Problems(config.problems)
    model, adapters = model_with_adapters(config.base, config.adapter, problems, log)
    (model,) = problems.required(model)
    log_base(model.base, log, model.tokenizer, config.adapter)
    compute, why = choose_compute(config.compute, config.remeasure)
    log.decision(f"compute: {why}")
    decode = choose_decode(config.decode, model.base)
    session = open_session(model, compute, choose_store(config.store, model.base, compute)[0][0], decode=decode)
    spec, tokenizer = model.base.spec, model.tokenizer
    encoder = Encoder(tokenizer, model.template, spec.max_positions, vocab_size=spec.vocab_size)
    active = {name: session.load(adapter) for name, adapter in adapters.items()}
    if config.max_new_tokens >= spec.max_positions:
        log.note(f"the context of the base is {spec.max_positions:,} tokens: answers end with it")
    options = SamplingOptions(
        config.max_new_tokens, tokenizer.stop_ids, config.temperature, config.top_p, config.top_k, config.min_p,
        config.seed,
    )  # fmt: skip
    return Conversation(
        session, tokenizer, encoder, active, options, config.system, log.warning, _forms(config.adapter, log)
    )


def _forms(adapters: Iterable[str], log: EventLog) -> dict[str, Callable[[str], str]]:
    """What writes a turn into the prompt that an adapter was trained on, by its name; tells what cannot be written."""
    forms = {}
    for name in adapters:
        run = run_with_columns(name)
        if run and (form := turn_form(run)):
            forms[name] = form
            log.decision(f"prompts: each turn is written as {name} was trained ({typed_columns(run)})")
        elif run and run.prompt_template:
            log.warning(
                f"{name} was trained on prompts made of several columns ({typed_columns(run)}): a chat has one "
                "text; type it in that form, or answer a file of such rows with thimble generate"
            )
        elif run and run.text_column:
            log.warning(
                f"{name} was trained on plain text, which it continues; a chat asks it in the chat template instead. "
                f"To continue texts, answer a file with thimble generate {typed_columns(run)}"
            )
    return forms
