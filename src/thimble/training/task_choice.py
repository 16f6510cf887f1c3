"""Which task a run is for, where the user does not say: by what the base is, and what the data are."""

from collections.abc import Mapping
from pathlib import Path

from thimble.config.train import TrainConfig
from thimble.data.media.find import guess_kind
from thimble.data.sentences import CLASSIFY, EMBED, guess_task
from thimble.errors import InputError
from thimble.events import EventLog
from thimble.files.untrusted import read_json_object
from thimble.models.module_base import is_function
from thimble.models.weight_files import MOST_CONFIG_BYTES

TEXT = "text"
SOUND_FIELDS = {"num_mel_bins", "feat_extract_norm", "conv_stride"}  # of configs: Whisper and spectrograms, wav2vec 2.0
PICTURE_FIELDS = {"image_size", "num_channels"}


def choose_task(config: TrainConfig, log: EventLog) -> str:
    """The task of a run; one that cannot be told is text, where whatever is wrong is refused by name."""
    if config.task != "auto":
        return config.task
    base, found = base_config(config.base), _kind(config.data)
    kind = found or _taken(base)
    if kind == "image":
        return _told("classify-image", "the data are pictures" if found else "the base takes pictures", log)
    if kind == "audio":
        is_writer = base.get("is_encoder_decoder") is True and "Classification" not in str(base.get("architectures"))
        task = "transcribe" if is_writer else "classify-audio"
        why = ("the data are" if found else "the base takes") + " sound"
        return _told(task, why + (", and the base writes texts" if task == "transcribe" else ""), log)
    if base and not writes_texts(base.get("architectures")):
        reads = f"the base is a {base.get('model_type')!r}, which reads and does not write"
        if guess_task(config.data) == EMBED:
            return _told(EMBED, f"{reads}, and the rows are pairs", log)
        return _told(CLASSIFY, reads, log)
    return TEXT


def _kind(data: str) -> str:
    try:
        return guess_kind(Path(data)) if data else ""
    except (InputError, OSError, ValueError):
        return ""


def base_config(base: str | None) -> dict[str, object]:
    """config.json of a base; empty if it has none that can be read."""
    if not base or is_function(base):
        return {}
    try:
        return read_json_object(Path(base) / "config.json", MOST_CONFIG_BYTES, InputError)
    except (InputError, OSError, ValueError):
        return {}


def writes_texts(names: object) -> bool:
    """Whether a model writes texts, by the names of its classes, as the config of a base has them."""
    if not isinstance(names, list):
        return True
    return any(end in str(name) for name in names for end in ("CausalLM", "LMHead", "ConditionalGeneration"))


def _taken(base: Mapping[str, object]) -> str:
    """What a base takes in the place of text, by its config: "image", "audio", or nothing if that is text too."""
    if "text_config" in base or "audio_config" in base:
        return ""
    if SOUND_FIELDS & base.keys():
        return "audio"
    return "image" if PICTURE_FIELDS & base.keys() and "vocab_size" not in base else ""


def _told(task: str, why: str, log: EventLog) -> str:
    log.decision(f"task: {task}, since {why}; --task names another")
    return task
