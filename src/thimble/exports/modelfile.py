"""The Modelfile that Ollama makes a model of. Written from Ollama's documentation; it was not run here.

Ollama's templates are Go's, not Jinja's: one is written where the base's own template does what a known one does.
"""

from thimble.data.model import Model
from thimble.data.template import ChatTemplate
from thimble.errors import InputError

_MESSAGES = "{{ range .Messages }}"
# What a user's "A" is written as, and the same in Go.
KNOWN = {
    "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n": (
        _MESSAGES + "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    ),
    "<|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n": (
        _MESSAGES + "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "<start_of_turn>user\nA<end_of_turn>\n<start_of_turn>model\n": (
        _MESSAGES + '<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user{{ end }}\n{{ .Content }}'
        "<end_of_turn>\n{{ end }}<start_of_turn>model\n"
    ),
    "<|user|>\nA<|end|>\n<|assistant|>\n": (
        _MESSAGES + "<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n"
    ),
}


def modelfile(model: Model, file: str, adapter: str = "") -> str:
    """The text of a Modelfile for a model, or for a base with an adapter.

    Args:
        model: The base, for its template and the tokens that end an answer.
        file: The GGUF model: an absolute path, or `./name` in the folder of the Modelfile.
        adapter: A GGUF adapter for it, named likewise; empty for none.

    Returns:
        The text.
    """
    lines = ["# Untested: written from Ollama's documentation, Ollama was not run.", f"FROM {file}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    template = _go_template(model.template, model.tokenizer.bos_token or "") if model.template else None
    if template and model.template:
        lines.append(f'TEMPLATE """{template}"""')
        system = model.template.default_system
        lines += [f'SYSTEM """{system}"""'] if system and '"""' not in system else []
    stops = sorted(model.tokenizer.piece(index) for index in model.tokenizer.stop_ids)
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and stop.strip()]
    return "\n".join(lines) + "\n"


def _go_template(template: ChatTemplate, bos: str) -> str | None:
    """The known template that writes a question as this one does; bos is left to the tokenizer there."""
    try:
        whole = template.render([{"role": "user", "content": "A"}], add_generation_prompt=True)
    except InputError:  # one that takes no such conversation is none of the known
        return None
    for known, go in KNOWN.items():
        if known in (whole, whole.removeprefix(bos)) or (template.default_system and whole.endswith(known)):
            return go
    return None
