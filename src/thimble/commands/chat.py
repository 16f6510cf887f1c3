"""`thimble chat`: talk to a base or an adapter, and switch between them while talking."""

from thimble.backends.open import choose_store, open_session
from thimble.config.chat import ChatConfig
from thimble.data.encode import Encoder
from thimble.data.model import log_base, model_with_adapters
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
    session = open_session(model, compute, choose_store(config.store, model.base, compute)[0][0])
    spec, tokenizer = model.base.spec, model.tokenizer
    encoder = Encoder(tokenizer, model.template, spec.max_positions, vocab_size=spec.vocab_size)
    active = {name: session.load(adapter) for name, adapter in adapters.items()}
    if config.max_new_tokens >= spec.max_positions:
        log.note(f"the context of the base is {spec.max_positions:,} tokens: answers end with it")
    options = SamplingOptions(
        config.max_new_tokens, tokenizer.stop_ids, config.temperature, config.top_p, config.top_k, config.min_p,
        config.seed,
    )  # fmt: skip
    return Conversation(session, tokenizer, encoder, active, options, config.system, log.warning)
