"""The card of an adapter folder: the hub's own reader is the oracle; nobody else's text is written over."""

import dataclasses

import pytest
from huggingface_hub import ModelCard

from run_reports import STATES, full_report
from thimble.config.merge import MergeConfig
from thimble.report.card import CARD, About, derived_card, is_ours, training_card
from thimble.report.keys import to_json_dict
from thimble.training.card import write_card
from thimble.training.result import TrainReport, read_report

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
ABOUT = About("a.gguf", HUB, "a.gguf", "apache-2.0", "AutoModelForCausalLM", [8, 8], [2.0, 2.0], 1000, use_dora=False)
DATA = {"/home/ana/private/calls | 1.jsonl": "ab" * 32}


def card_of(report=None, about=ABOUT, data=DATA, **changes):
    report = dataclasses.asdict(read_report(report or full_report()))
    return training_card(about, {**report, "training_rows": 1800, **changes}, data)


def test_the_hub_reads_the_front_matter_and_shows_the_text():
    card = ModelCard(card_of())
    assert card.data.to_dict() == {
        "base_model": HUB, "library_name": "peft", "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{HUB}", "lora", "peft", "thimble"],
    }  # fmt: skip
    for part in ("1,800 rows to learn from", "ab" * 32, "| loss on held-out rows, nats per token | 2.094 | 0.312 |",
                 "| right function, of 200 answers | 0 | 190 |", "thimble train", "PeftModel.from_pretrained",
                 "llama-server", "ADAPTER ./adapter.gguf", "--max-lora-rank 8"):  # fmt: skip
        assert part in card.text, part


def test_a_task_has_its_pipeline_and_no_words_of_text_models():
    about = dataclasses.replace(
        ABOUT,
        file="",
        hub_name="",
        base="vit",
        loader="AutoModelForImageClassification",
        task="classify-image",
        labels=3,
    )
    card = ModelCard(card_of(about=about, task="classify-image"))
    assert card.data.pipeline_tag == "image-classification"
    for part in ('AutoModelForImageClassification.from_pretrained("path/to/vit", num_labels=3, ignore_mismatched_sizes',
                 "| | frozen model with a trained head | with the adapter |", "| loss on held-out pictures, nats |",
                 "thimble generate DATA --adapter adapter --base BASE --out answers.jsonl"):  # fmt: skip
        assert part in card.text, part
    for other in ("llama", "vllm", "ADAPTER"):
        assert other not in card.text
    own = ModelCard(card_of(about=dataclasses.replace(about, base="net.py:build", loader=""), task="classify-image"))
    assert "import" not in own.text


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_any_state_has_a_card(state):
    card = ModelCard(card_of(STATES[state][0]))
    assert card.data.base_model == HUB
    assert "nan" not in card.text.lower().split()


def test_what_is_not_known_is_left_out():
    card = ModelCard(card_of(about=dataclasses.replace(ABOUT, hub_name="", license="", file="")))
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}


def test_nothing_says_where_things_lie_on_this_machine():
    config = full_report()["config"] | {"data": "/home/ana/private/calls.jsonl", "base": "/home/ana/models/a.gguf"}
    text = card_of(config={**config, "out": "/home/ana/runs/1", "init": "adapter:/home/ana/runs/0"})
    assert "/home" not in text
    assert "thimble train calls.jsonl --base=a.gguf" in text
    assert "--init=adapter:0" in text
    assert "runs/1" not in text


def test_signs_of_markdown_in_names_are_shown_as_they_are():
    assert r"calls \| 1.jsonl, sha256" in card_of()
    assert "<b>" not in card_of(data={"<b>x</b>.jsonl": "0"})


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({"use_dora": True}, "do not run DoRA: merge it", "vllm serve"),
        ({"scales": [2.0, 1.0]}, "vLLM gives all layers one scale", "vllm serve"),
        ({"ranks": [8, 2048]}, "which takes ranks up to 512", "vllm serve"),
        ({"ranks": [8, 9]}, "--max-lora-rank 16", "Not with vLLM"),
        ({"hub_name": ""}, 'from_pretrained("path/to/its/folder", gguf_file="a.gguf")', "huggingface.co"),
    ],
)
def test_it_says_where_the_adapter_does_not_run(changes, said, unsaid):
    text = card_of(about=dataclasses.replace(ABOUT, **changes))
    assert said in text
    assert unsaid not in text


def test_a_card_of_ours_is_written_anew_and_a_changed_one_stays(tmp_path):
    write_card(tmp_path, card_of())
    assert is_ours(tmp_path / CARD)
    write_card(tmp_path, card_of(steps=7))
    mine = (tmp_path / CARD).read_text()
    assert "| steps | 7 |" in mine
    for theirs in (mine + "My own words.\n", mine.replace("apache-2.0", "mit"), "# Mine\n", "\udcff"):
        (tmp_path / CARD).write_bytes(theirs.encode(errors="surrogateescape"))
        assert not is_ours(tmp_path / CARD)
        before = (tmp_path / CARD).read_bytes()
        write_card(tmp_path, card_of())
        assert (tmp_path / CARD).read_bytes() == before


def test_a_link_is_nothing_of_ours(tmp_path):
    write_card(tmp_path, card_of())
    (tmp_path / CARD).rename(tmp_path / "elsewhere.md")
    (tmp_path / CARD).symlink_to("elsewhere.md")
    assert not is_ours(tmp_path / CARD)


def test_a_derived_adapter_says_what_it_was_made_of():
    config = MergeConfig.build({"adapter": ["/x/one", "/x/two"], "weight": [0.5, 2], "rank": 4, "out": "/x/three"})
    text = derived_card(ABOUT, "merge", config, [("made from", "one, two")])
    assert "thimble merge one two --rank=4 --weight=0.5 --weight=2.0" in text
    assert ModelCard(text).data.base_model == HUB


def test_a_report_that_was_read_back_makes_the_same_card():
    report = TrainReport(**dataclasses.asdict(read_report(full_report(training_rows=3))))
    again = dataclasses.asdict(read_report(to_json_dict(report)))
    assert training_card(ABOUT, again, DATA) == training_card(ABOUT, dataclasses.asdict(report), DATA)
