"""Configs, tokenizers and headers from untrusted sources, wrong in ways that only a reader of them would think of."""

import contextlib
import copy
import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stress import TINY, Line
from stress.files import MEMORY, mutated, try_all
from stress.grammar import changed, damaged_json, text_of
from stress.guided import Corpus

TEXT = "Hello there, the 12 cats\n  ate <|im_end|> naïve 猫 </s>"


def fuzz_adapter_config(count: int) -> Line:
    """An adapter_config.json, changed as JSON or as bytes, beside tensors that are sound."""
    from thimble.files.peft import CONFIG_FILE, load_adapter

    dice = random.Random(0)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = write_adapter(Path(name))
        corpus = Corpus(json.loads((folder / CONFIG_FILE).read_text()))

        def cases() -> Iterator[Callable[[], object]]:
            for _ in range(count):
                content = damaged_json(corpus.pick(dice), dice)
                (folder / CONFIG_FILE).write_bytes(content)
                case = partial(load_adapter, folder)
                with contextlib.suppress(ValueError, RecursionError):  # to be changed again it has to be JSON
                    corpus.watch(json.loads(content), case)
                yield case

        line = try_all("adapter configs, changed as JSON and as bytes", cases())
    line.note += f"; {len(corpus.found)} that reached new lines were changed again"
    return line


def write_adapter(folder: Path) -> Path:
    """A sound adapter of two layers, of different ranks."""
    from thimble.core.adapter import Adapter
    from thimble.core.lowrank import Factors
    from thimble.files.peft import save_adapter

    sizes = {"model.layers.0.mlp.up_proj": 2, "model.layers.0.self_attn.q_proj": 3}
    layers = {path: Factors(np.ones((r, 4), "f4"), np.ones((3, r), "f4"), 2.0) for path, r in sizes.items()}
    save_adapter(Adapter(layers, "some/base"), folder)
    return folder


def fuzz_adapter_tensors(count: int) -> Line:
    """The header of an adapter's tensors, changed as JSON; what we take, the reference takes, with the same numbers."""
    from thimble.files.peft import WEIGHTS_FILE, load_adapter
    from thimble.files.tensors import open_tensors

    dice = random.Random(0)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        path = write_adapter(Path(name)) / WEIGHTS_FILE
        whole = path.read_bytes()
        size = int.from_bytes(whole[:8], "little")
        header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]

        def case() -> None:
            compare_with_reference(path, open_tensors(path))
            load_adapter(name)

        def cases() -> Iterator[Callable[[], object]]:
            for _ in range(count):
                path.write_bytes(damaged_tensors(header, data, whole, dice))
                yield case

        return try_all("headers of adapter tensors, changed as JSON and as bytes", cases())


def damaged_tensors(header: dict[str, Any], data: bytes, whole: bytes, dice: random.Random) -> bytes:
    """A safetensors file whose header says something else, or that has other bytes, or less or more data."""
    if dice.random() < 0.3:
        return mutated(whole, dice, len(whole) - len(data))
    text = text_of(_moved(header, dice) if dice.random() < 0.5 else changed(header, dice), dice)
    if dice.random() < 0.1:
        data = dice.choice([data[:-4], data + b"\0" * 4, b""])
    return struct.pack("<Q", len(text)) + text + data


def _moved(header: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """Other types, shapes and offsets, that might fit."""
    header = copy.deepcopy(header)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(dice.randint(1, 2)):
        entry, kind = header[dice.choice(names)], dice.randrange(6)
        if kind == 0:
            entry["dtype"] = dice.choice(
                ["F16", "BF16", "I32", "F64", "U8", "F4", "F8_E4M3", "F32", "Q4_0", "BOOL", ""]
            )
        elif kind == 1:
            entry["shape"] = dice.choice([entry["shape"][::-1], [*entry["shape"], 1], [0, 1 << 60], [], [-1, -12]])
        elif kind == 2:
            entry["data_offsets"] = [max(0, place + dice.choice([-4, 0, 4])) for place in entry["data_offsets"]]
        elif kind == 3:  # two tensors change places
            other = header[dice.choice(names)]
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        elif kind == 4:
            header[dice.choice(["../../etc/passwd", "a\0b", "", "x" * 600, "t"])] = entry
        else:
            header["empty"] = {
                "dtype": "F32",
                "shape": [0],
                "data_offsets": [entry["data_offsets"][dice.randrange(2)]] * 2,
            }
    return header


def compare_with_reference(path: Path, file: Any) -> None:
    """Fail unless the package `safetensors` takes this file too and finds the same in it."""
    import safetensors

    found = dict(safetensors.deserialize(path.read_bytes()))
    assert found.keys() == file.tensors.keys()
    for name, entry in found.items():
        info = file.tensors[name]
        assert (info.dtype, list(info.shape)) == (entry["dtype"], entry["shape"])
        assert file.data[info.offset : info.offset + info.nbytes] == bytes(entry["data"])


_SMALL = {
    "vocab_size": 320, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
_KINDS = ["sliding_attention", "full_attention"]
CONFIGS: tuple[dict[str, Any], ...] = (
    {**_SMALL, "model_type": "llama", "rope_scaling": _LLAMA3},
    {**_SMALL, "model_type": "qwen3", "rope_scaling": _YARN, "use_sliding_window": True, "sliding_window": 8,
     "max_window_layers": 1},
    {**_SMALL, "model_type": "phi3", "original_max_position_embeddings": 32, "sliding_window": None,
     "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
    {**_SMALL, "model_type": "smollm3", "no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    {**_SMALL, "model_type": "gemma2", "query_pre_attn_scalar": 8, "hidden_activation": "gelu_pytorch_tanh",
     "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 8},
    {"model_type": "gemma3", "text_config": {**_SMALL, "model_type": "gemma3_text", "query_pre_attn_scalar": 8,
     "layer_types": _KINDS, "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh",
     "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _KINDS}}},
)  # fmt: skip


def write_base(folder: Path, config: dict[str, Any]) -> Path:
    """A sound Hugging Face folder of two shards with an index, without a tokenizer."""
    from thimble.files.tensors import write_safetensors
    from thimble.models.spec import spec_from_config
    from thimble.models.weights import expected_shapes

    folder.mkdir()
    tensors = {name: np.ones(shape, "f4") for name, shape in expected_shapes(spec_from_config(config)).items()}
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / shard, {name: tensors[name] for name in part}, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (folder / "config.json").write_text(json.dumps(config))
    whole = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    return folder


def fuzz_base_folder(count: int) -> Line:
    """config.json or the index of a Hugging Face folder, changed as JSON or as bytes; what is opened is read."""
    from thimble.models.base import open_base

    def case(folder: Path) -> None:
        base = open_base(folder)
        assert len(base.spec.windows) == len(base.spec.ropes) == base.spec.num_layers
        for rope in base.spec.ropes:
            assert rope is None or (np.isfinite(rope.inv_freq).all() and 0 < rope.scale < 1e6)
        for weight in base.weights.values():
            weight.read()

    def cases(parent: Path) -> Iterator[Callable[[], object]]:
        dice = random.Random(0)
        folders = [write_base(parent / str(number), config) for number, config in enumerate(CONFIGS)]
        whole = {path: path.read_bytes() for folder in folders for path in folder.glob("*.json")}
        parsed = {path: json.loads(content) for path, content in whole.items()}
        for _ in range(count):
            path = dice.choice([path for path in whole if path.name == "config.json" or dice.random() < 0.3])
            path.write_bytes(damaged_json(parsed[path], dice))
            yield partial(case, path.parent)
            path.write_bytes(whole[path])

    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        return try_all("config.json and index of a folder, changed as JSON and as bytes", cases(Path(name)))


def use_tokenizer(tokenizer: Any) -> None:
    """Everything that is asked of a tokenizer."""
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids, skip_special=True)
    tokenizer.encode(TEXT, special=False)
    tokenizer.encode_pieces(["a", "b<|im_end|>", " c"])
    for index in ids:
        tokenizer.piece_bytes(index)


def fuzz_tokenizers(count: int) -> Line:
    """The JSON files of a tokenizer, changed as JSON or as bytes; what is opened encodes and decodes."""
    from fixtures.tiny_tokenizers import write_tokenizer
    from thimble.data.tokenizer import tokenizer_from_folder

    def cases(parent: Path) -> Iterator[Callable[[], object]]:
        dice, parsed = random.Random(0), {}
        for kind in ("llama-bpe", "smollm", "llama", "gemma"):
            write_tokenizer(kind, parent / kind)
            (parent / kind / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
            (parent / kind / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
            parsed |= {path: json.loads(path.read_text()) for path in (parent / kind).glob("*.json")}
        whole = {path: path.read_bytes() for path in parsed}
        for _ in range(count):
            path = dice.choice([path for path in whole if path.name == "tokenizer.json" or dice.random() < 0.5])
            path.write_bytes(damaged_json(parsed[path], dice))
            yield lambda folder=path.parent: use_tokenizer(tokenizer_from_folder(folder))
            path.write_bytes(whole[path])

    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        return try_all("tokenizer files of a folder, changed as JSON and as bytes", cases(Path(name)))


def fuzz_gguf_metadata(count: int) -> Line:
    """Metadata of a GGUF with other values: its description and its tokenizer are made, or refused."""
    from thimble.data.tokenizer import tokenizer_from_gguf
    from thimble.files.tensors import open_tensors
    from thimble.models.spec import spec_from_gguf

    folder = TINY.parent
    names = ("smollm2", "llama", "gemma3", "qwen3_yarn", "phi3_longrope", "llama_linear_rope")
    wholes = [dict(open_tensors(folder / f"{name}.gguf").metadata) for name in names]
    angles = {f"rope_factors_{kind}.weight": np.ones(4, "f4") for kind in ("long", "short")}

    def description(metadata: dict[str, Any]) -> None:
        spec = spec_from_gguf(metadata, 320, True, angles if metadata.get("general.architecture") == "phi3" else {})
        assert len(spec.windows) == len(spec.ropes) == spec.num_layers

    def cases() -> Iterator[Callable[[], object]]:
        dice = random.Random(0)
        for number in range(count):
            metadata = changed(dice.choice(wholes), dice)
            if not isinstance(metadata, dict):
                metadata = {}
            if number % 2:
                yield partial(description, metadata)
            else:
                yield lambda metadata=metadata: use_tokenizer(tokenizer_from_gguf(metadata))

    return try_all("GGUF metadata with other values", cases())
