"""Tiny random models of many architectures: attach, three steps, save, load, open in PEFT, merge, switch off.

The table in docs/any_model.md is what comes of it; `python tests/backends/torch/test_zoo.py` writes it again.
"""

import re
import tempfile
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf

import thimble

PAGE = Path(__file__).parents[3] / "docs" / "any_model.md"
HEAD = "| model | what it is | LoRA on | frozen, out of reach | told |\n|---|---|---|---|---|\n"
IDS, LABELS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
TEXT, CLASSES = {"input_ids": IDS, "labels": IDS}, {"input_ids": IDS, "labels": LABELS}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin(), "labels": LABELS}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {**SIZE, "vocab_size": 40}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIDES = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 40,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 1, **ENDS,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40, **ENDS}
HEADED = {"train_also": ["classifier"]}


def clip():
    picture = {**SIZE, "image_size": 32, "patch_size": 16}
    text = {**WORDS, "max_position_embeddings": 16, **ENDS}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=picture, projection_dim=8))


def speech():
    config = hf.Wav2Vec2Config(
        **WORDS, conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False, pad_token_id=0,
    )  # fmt: skip
    return hf.Wav2Vec2ForCTC(config)


ZOO = {
    "BERT": ("encoder", lambda: hf.BertForSequenceClassification(hf.BertConfig(**WORDS, num_labels=3)),
             CLASSES, HEADED),
    "ModernBERT": ("encoder", lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(
        **WORDS, **ENDS, cls_token_id=1, sep_token_id=2)), TEXT, {}),
    "GPT-2": ("decoder", lambda: hf.GPT2LMHeadModel(hf.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)), TEXT, {}),
    "Llama": ("decoder", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS)), TEXT, {}),
    "OPT": ("decoder", lambda: hf.OPTForCausalLM(hf.OPTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, vocab_size=40, word_embed_proj_dim=16,
        max_position_embeddings=16)), TEXT, {}),
    "T5": ("encoder-decoder", lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
           TEXT, {}),
    "BART": ("encoder-decoder", lambda: hf.BartForConditionalGeneration(hf.BartConfig(
        **SIDES, max_position_embeddings=16)), TEXT, {}),
    "ViT": ("pictures", lambda: hf.ViTForImageClassification(hf.ViTConfig(
        **SIZE, image_size=32, patch_size=16, num_labels=3)), PIXELS, HEADED),
    "ResNet": ("pictures", lambda: hf.ResNetForImageClassification(hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)), PIXELS,
        {"targets": "all-conv", **HEADED}),
    "CLIP": ("pictures and text", clip, {
        "input_ids": IDS, "pixel_values": PIXELS["pixel_values"], "return_loss": True}, {}),
    "Whisper": ("speech", lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(
        **SIDES, num_mel_bins=8, max_source_positions=20, max_target_positions=16)),
        {"input_features": PIXELS["pixel_values"].reshape(2, 8, -1)[:, :, :40], "labels": IDS}, {}),
    "wav2vec 2.0": ("speech", speech, {"input_values": PIXELS["pixel_values"].reshape(2, -1)[:, :400],
                                       "labels": IDS[:, :3]}, {}),
    "Mixtral": ("mixture of experts", lambda: hf.MixtralForCausalLM(hf.MixtralConfig(
        **WORDS, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)), TEXT, {}),
    "Mamba": ("state space", lambda: hf.MambaForCausalLM(hf.MambaConfig(
        hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=40, **ENDS)), TEXT,
        {"targets": ["in_proj", "x_proj", "dt_proj"]}),
    "Mamba 2": ("state space", lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(
        hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1, vocab_size=40, **ENDS)),
        TEXT, {"targets": ["in_proj"]}),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    return ZOO[name][1]()


@torch.no_grad()
def loss_of(model, name):
    return model.eval()(**ZOO[name][2]).loss


def trained(name):
    """The model after three steps, the attachment, the losses and what was told."""
    model = make(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = thimble.attach(model, rank=4, **ZOO[name][3])
        optimiser, losses = torch.optim.AdamW(found.trained.values(), 1e-2), []
        for _ in range(3):
            loss = model.train()(**ZOO[name][2]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    messages = [str(warning.message) for warning in caught if "adapted layer" in str(warning.message)]
    told = [re.sub(r", which so.*: (.*)\. If.*", r": \1", message) for message in messages]
    return model, found, losses, told


def row_of(name):
    """The row of a model in the table; it holds only if all that is checked holds."""
    model, found, losses, told = trained(name)
    assert losses[-1] < losses[0]
    result = loss_of(model, name)
    with tempfile.TemporaryDirectory() as folder:
        thimble.save_adapter(thimble.adapter_of(model), folder)
        again = make(name)
        thimble.attach(again, adapter=folder)
        assert torch.equal(loss_of(again, name), result)
        opened = peft.PeftModel.from_pretrained(make(name), folder)
        torch.testing.assert_close(loss_of(opened, name), result, rtol=1e-4, atol=1e-5)
    with thimble.adapter_off(model):
        assert torch.equal(loss_of(model, name), loss_of(make(name), name))
    thimble.merge(model)
    torch.testing.assert_close(loss_of(model, name), result, rtol=1e-4, atol=1e-5)
    thimble.detach(model)
    torch.testing.assert_close(loss_of(model, name), result, rtol=1e-4, atol=1e-5)
    kinds = re.sub(r"^LoRA on \d+ weights?: ", "", str(found).splitlines()[0])
    beyond = [line for line in str(found).splitlines() if line.startswith("frozen, and")]
    beyond = beyond[0].partition("takes: ")[2] if beyond else ""
    return f"| {name} | {ZOO[name][0]} | {kinds} | {beyond} | {' '.join(told)} |\n"


QUICK = ("BERT", "ResNet", "Mixtral", "Mamba")  # one of each kind of trouble; the others run with the slow tests


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def test_a_model_of_the_zoo_does_what_its_row_in_the_page_says(name):
    assert row_of(name) in PAGE.read_text(), "run: python tests/backends/torch/test_zoo.py"


def test_the_page_has_no_other_rows():
    table = PAGE.read_text().partition(HEAD)[2].partition("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()] == list(ZOO)


if __name__ == "__main__":
    page = PAGE.read_text()
    before, head, rest = page.partition(HEAD)
    PAGE.write_text(before + head + "".join(map(row_of, ZOO)) + "\n" + rest.partition("\n\n")[2])
