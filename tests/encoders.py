"""A tiny text encoder with a tokenizer, as a Hugging Face folder, and rows that it can learn."""

import json
from pathlib import Path

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOPICS = {
    "animal": "cat dog cow hen pig goat duck horse".split(),
    "colour": "red blue green black white brown pink grey".split(),
    "tool": "saw hammer drill file axe spade rake plane".split(),
}
FILLERS = "the a my this one that old big new small".split()
WORDS = [word for words in TOPICS.values() for word in words]
VOCABULARY = [*MARKS, *FILLERS, *WORDS, *(f"of{word}" for word in WORDS), "##s", "."]


def write_tokenizer(folder: Path, words: list[str] = VOCABULARY) -> Path:
    """WordPiece as BERT has it; its tokenizer.json was saved while it padded and cut, as those of many models are."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(MARKS)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 512, "mask_token": "[MASK]", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_encoder(folder: Path, **changes: object) -> Path:
    """A BERT with random weights, in float32."""
    import torch
    import transformers

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "initializer_range": 0.2,
    }
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=24, **{**sizes, **changes})
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return write_tokenizer(folder)


def sentences() -> list[dict[str, str]]:
    """Short texts of uneven length, each about one topic, which is the label."""
    rows = []
    for place, (topic, words) in enumerate(TOPICS.items()):
        for number in range(40):
            fillers = [FILLERS[(number * 3 + place + part) % 10] for part in range(number % 4)]
            about = [words[(number * 5 + part * (1 + number % 3)) % 8] for part in range(3)]
            rows.append({"text": " ".join([*fillers, *about, "."]), "label": topic})
    return rows


def pairs() -> list[dict[str, str]]:
    """Each word in a text, and what belongs to it."""
    return [
        {"question": f"{FILLERS[number % 10]} {word} .", "answer": f"of{word} {FILLERS[(number + 3) % 10]}"}
        for number, word in enumerate(WORDS)
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
