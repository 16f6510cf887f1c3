"""Text models inside of models of text and images: found by their config, and named as if they stood alone.

Text alone goes through the wrapped model as it would through the plain one; a test holds the logits of each wrapper
here to those of transformers. Where that is not so (PaliGemma sees all of a prompt at once), the wrapper is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thimble.errors import BaseModelError
from thimble.files.torch_names import without_wrappers
from thimble.files.untrusted import shown
from thimble.models.fields import group

TEXT, IMAGE = "AutoModelForCausalLM", "AutoModelForImageTextToText"  # classes of transformers that open a base
INNER, INNER_TEXT = "model.language_model.", "model.text_model."


@dataclass(frozen=True)
class Wrapper:
    """How one kind of model holds its text model.

    Attributes:
        families: Families of text models that it may hold; the first one if its config does not say.
        prefix: What stands in front of `layers.0...` in the names of its modules in transformers.
        loader: The class of transformers that opens it.
        is_tied: Whether the head is the embedding if no config says.
        inner_ties: Whether a flag in the config of the text model ties the head too.
        type_names: What the text model's type is called, if not like its family.
    """

    families: tuple[str, ...]
    prefix: str = INNER
    loader: str = IMAGE
    is_tied: bool = False
    inner_ties: bool = False
    type_names: tuple[str, ...] = ()


_LLAVA = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")
WRAPPERS = {
    "gemma3": Wrapper(("gemma3_text",), loader=TEXT, is_tied=True),
    "mistral3": Wrapper(("mistral",), is_tied=True),
    "llava": Wrapper(_LLAVA, inner_ties=True),
    "llava_next": Wrapper(_LLAVA),
    "llava_onevision": Wrapper(("qwen2", "llama", "qwen3"), inner_ties=True),
    "vipllava": Wrapper(("llama",)),
    "video_llava": Wrapper(("llama",)),
    "internvl": Wrapper(("qwen2", "qwen3", "llama"), is_tied=True),
    "lighton_ocr": Wrapper(("qwen3",), is_tied=True),
    "idefics2": Wrapper(("mistral",), INNER_TEXT),
    "idefics3": Wrapper(("llama",), INNER_TEXT),
    "smolvlm": Wrapper(("llama",), INNER_TEXT),
    "qwen2_vl": Wrapper(("qwen2",), inner_ties=True, type_names=("qwen2_vl_text", "qwen2_vl")),
    "qwen2_5_vl": Wrapper(("qwen2",), inner_ties=True, type_names=("qwen2_5_vl_text", "qwen2_5_vl")),
    "qwen3_vl": Wrapper(("qwen3",), inner_ties=True, type_names=("qwen3_vl_text",)),
}
# What other kinds of model are, so that a refusal says more than their name.
OTHER_KINDS = {
    **dict.fromkeys(("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100", "led", "t5gemma"),
                    "an encoder-decoder model"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "deberta", "deberta-v2", "electra", "albert",
                     "modernbert", "nomic_bert", "eurobert"), "an encoder, which writes no text"),
    **dict.fromkeys(("paligemma", "mllama", "llama4", "gemma3n", "gemma4", "aya_vision", "cohere2_vision",
                     "internvl_chat", "molmo", "molmo2", "kosmos-2", "blip-2", "instructblip", "phi3_v",
                     "phi4_multimodal", "minicpmv", "florence2", "lfm2_vl", "qwen3_vl_moe", "qwen2_5_omni"),
                    "a model of text and images whose text part is not one of these"),
    **dict.fromkeys(("whisper", "wav2vec2", "qwen2_audio", "voxtral", "speech_to_text"), "a speech model"),
    **dict.fromkeys(("clip", "siglip", "vit", "dinov2"), "a vision model"),
}  # fmt: skip
# What the text models' own classes take when a wrapper's config leaves a field out, as LLaVA's does with most.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "max_position_embeddings": 131072},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    "gemma3_text": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                    "max_position_embeddings": 131072},
}  # fmt: skip
# Names of text tensors in files, by the version of transformers that wrote them, and what they are called alone.
_RENAMED = (
    ("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.lm_head.", "lm_head."),
    ("model.text_model.", "model."), ("text_model.lm_head.", "lm_head."), ("text_model.model.", "model."),
)  # fmt: skip
_BARE = ("layers.", "embed_tokens.", "norm.")  # of a text model saved without its head


def plain_name(name: str) -> str:
    """What a tensor of a wrapped text model is called in the model alone; other names stay."""
    name = without_wrappers(name)
    for start, ours in _RENAMED:
        if name.startswith(start):
            return ours + name[len(start) :]
    return f"model.{name}" if name.startswith(_BARE) else name


def unwrap(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Wrapper | None]:
    """The config of the text model inside of a wrapper, as if it stood alone, and the wrapper; else the config itself.

    A BaseModelError if the wrapper, or what it holds, is of a kind that is not supported.
    """
    kind = config.get("model_type")
    wrapper = WRAPPERS.get(kind) if isinstance(kind, str) else None
    if wrapper is None:
        if isinstance(kind, str) and kind in OTHER_KINDS:
            raise BaseModelError(
                f"config.json names model_type {shown(kind)}: supported are llama, mistral, smollm3, qwen2, qwen3, "
                f"gemma2, gemma3 and phi3, the text models inside of {', '.join(WRAPPERS)}, and the causal language "
                f"models of transformers; {kind} is {OTHER_KINDS[kind]}"
            )
        return config, None
    text = dict(group(config, "text_config") or _flat(config))  # older Qwen2-VL folders have it all on one level
    family = text.get("model_type") or wrapper.families[0]
    family = wrapper.families[0] if family in wrapper.type_names else family
    if family not in wrapper.families:
        raise BaseModelError(
            f"config.json names model_type {shown(kind)} with a text model of type {shown(family)}: supported in it "
            f"{'is' if len(wrapper.families) == 1 else 'are'} {', '.join(wrapper.families)}"
        )
    text |= {"model_type": family, "tie_word_embeddings": _is_tied(config, text, wrapper)}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), dict):
            text[key] = _without_axes(text[key])
    return {**DEFAULTS.get(family, {}), **text}, wrapper


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith(("vision_", "image_", "video_"))}


def _is_tied(config: Mapping[str, Any], text: Mapping[str, Any], wrapper: Wrapper) -> Any:
    outer = config.get("tie_word_embeddings", wrapper.is_tied)
    return True if wrapper.inner_ties and outer is False and text.get("tie_word_embeddings") is True else outer


def _without_axes(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A rotary embedding over time, height and width as text has it, whose positions are the same on all three."""
    plain = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
    return plain | {key: "default" for key in ("type", "rope_type") if plain.get(key) == "mrope"}
