import numpy as np
import pytest

from thimble.data.encode import IGNORED, Encoder
from thimble.data.encode_all import encode_all
from thimble.data.records import Skipped, general_records
from thimble.data.rows import Record, parse_row
from thimble.data.template import ChatTemplate
from thimble.data.tool_text import write_tools
from thimble.errors import BaseModelError, DataError

BARE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3: thinking is kept in the last turn only.
STRIPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek R1: the generation prompt opens a thinking part that finished turns do not show.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# As Phi 3.5: a conversation at rest ends with eos.
RESTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def user(text="Hi"):
    return {"role": "user", "content": text}


def answer(text="Hello", **more):
    return {"role": "assistant", "content": text, **more}


def chat(*messages, **more):
    return Record(messages=messages, source="data line 1", **more)


def learned(tokenizer, row):
    return tokenizer.decode(row.labels[row.labels != IGNORED])


def is_prefix(question, row):
    return np.array_equal(question.ids, row.ids[: len(question.ids)])


@pytest.fixture
def encoder(smollm, smollm_template):
    return Encoder(smollm, smollm_template, seq_len=1024)


@pytest.fixture
def encoder_of(smollm):
    """An encoder for another template over the vocabulary of SmolLM."""
    return lambda source: Encoder(smollm, ChatTemplate(source, "<|im_start|>", "<|im_end|>"), seq_len=1024)


# --- what is learned


def test_the_answer_and_its_end_are_learned_and_nothing_else(encoder, smollm):
    (row,) = encoder.encode(chat(user(), answer()))
    assert learned(smollm, row) == "Hello<|im_end|>"
    assert smollm.decode(row.ids).endswith("<|im_start|>assistant\nHello<|im_end|>")
    assert row.ids.dtype == row.labels.dtype == np.int32
    assert (row.source, row.truncated_tokens) == ("data line 1", 0)


def test_a_label_is_the_next_token(encoder):
    (row,) = encoder.encode(chat(user(), answer(), user("And?"), answer("So.")))
    assert len(row.ids) == len(row.labels)
    assert row.labels[-1] == IGNORED
    places = np.flatnonzero(row.labels != IGNORED)
    assert np.array_equal(row.labels[places], row.ids[places + 1])


def test_every_assistant_turn_is_learned(encoder, smollm):
    (row,) = encoder.encode(chat(user(), answer(), user("And?"), answer("So.")))
    assert learned(smollm, row) == "Hello<|im_end|>So.<|im_end|>"
    assert row.target_tokens == len(smollm.encode("Hello<|im_end|>So.<|im_end|>"))


def test_a_turn_of_weight_zero_is_not_learned(encoder, smollm):
    (row,) = encoder.encode(chat(user(), answer(weight=0), user("And?"), answer("So.")))
    assert learned(smollm, row) == "So.<|im_end|>"
    assert encoder.notes[0] == "target tokens: all assistant turns but those that are marked as not learned"


def test_what_follows_the_last_answer_is_left_out(encoder, smollm):
    (row,) = encoder.encode(chat(user(), answer(), user("And?")))
    assert "And?" not in smollm.decode(row.ids)


def test_a_greeting_that_nobody_asked_for_is_given(encoder, smollm):
    (row,) = encoder.encode(chat(answer("Welcome!"), user(), answer()))
    assert learned(smollm, row) == "Hello<|im_end|>"
    assert "Welcome!" in smollm.decode(row.ids)


SYSTEM = {"role": "system", "content": "Be brief."}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESULT = {"role": "tool", "content": "3"}
# Conversations in any order, and which of their messages are learned.
ORDERS = {
    "opened by the assistant": ([answer("Welcome!"), user(), answer()], [2]),
    "opened by the assistant behind a system text": ([SYSTEM, answer("Welcome!"), user(), answer()], [3]),
    "opened twice": ([answer("One"), answer("Two"), user(), answer()], [3]),
    "two answers in a row": ([user(), answer("One"), answer("Two")], [1, 2]),
    "two answers in a row, the first is marked": ([user(), answer("One", weight=0), answer("Two")], [2]),
    "two questions in a row": ([user(), user("Well?"), answer()], [2]),
    "a question behind the last answer": ([user(), answer(), user("And?")], [1]),
    "a result behind the last answer": ([user(), answer(), RESULT], [1]),
    "a result before the answer": ([user(), answer("f(1)"), RESULT, answer()], [1, 3]),
    "a result at the beginning": ([RESULT, answer()], [1]),
    "system text in the middle": ([user(), answer("One"), SYSTEM, user(), answer("Two")], [1, 4]),
    "no question but a system text": ([SYSTEM, answer()], [1]),
    "a marked answer at the end": ([user(), answer("One"), user(), answer("Two", weight=0)], [1]),
}


@pytest.mark.parametrize("source", [CHATML, INST], ids=["ChatML", "Mistral"])
def test_what_is_learned_is_what_the_page_says_whatever_the_order_of_roles(encoder_of, smollm, source):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def written(messages, asks=False):
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        text = oracle.render(messages=write_tools(messages, None), add_generation_prompt=asks, **names)
        return text if asks else text.removesuffix("\n")

    oracle, encoder = _compile_jinja_template(source), encoder_of(source)
    for order, (messages, expected) in ORDERS.items():
        (row,) = encoder.encode(chat(*messages))
        spans = [written(messages[: at + 1]).removeprefix(written(messages[:at], asks=True)) for at in expected]
        assert learned(smollm, row) == "".join(spans), order
        assert smollm.decode(row.ids) == written(messages[: expected[-1] + 1]), order


def test_thoughts_and_names_that_the_template_does_not_write_are_told(encoder_of):
    encoder = encoder_of(CHATML)
    encoder.encode(chat({**user(), "name": "Ann"}, answer(reasoning_content="Let me think.")))
    assert "1 row: the chat template does not write the name of a speaker" in encoder.notes
    assert encoder.warnings[0].startswith("the chat template does not write the thinking (reasoning_content) of 1 row")
    encoder = encoder_of(CHATML.replace("{{ m.content }}", "{{ m.name }}{{ m.reasoning_content }}{{ m.content }}"))
    encoder.encode(chat({**user(), "name": "Ann"}, answer(reasoning_content="Let me think.")))
    assert encoder.warnings == []


def test_what_follows_the_last_answer_is_told(encoder):
    encoder.encode(chat(user(), answer(), user("And?")))
    assert "1 conversation: what follows the last learned answer is left out" in encoder.notes


def test_marks_that_are_overruled_are_told(smollm, smollm_template):
    encoder = Encoder(smollm, smollm_template, 1024, loss_on="all")
    encoder.encode(chat(user(), answer(weight=0), user(), answer()))
    assert encoder.warnings[0].startswith("--loss-on all learns whole rows: 1 row with messages that are marked")


def test_all_tokens_are_learned_if_asked_for(smollm, smollm_template):
    (row,) = Encoder(smollm, smollm_template, 1024, loss_on="all").encode(chat(user(), answer()))
    assert np.array_equal(row.labels[:-1], row.ids[1:])


def test_calls_are_learned_as_the_template_writes_them(encoder, smollm):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
    record = chat(
        user(), answer(None, tool_calls=[call]), {"role": "tool", "content": "rain"}, answer("Rain."), tools=(tool,)
    )
    (row,) = encoder.encode(record)
    call_text = '<tool_call>\n{"name":"weather","arguments":{"city":"Oslo"}}\n</tool_call><|im_end|>'
    assert learned(smollm, row) == call_text + "Rain.<|im_end|>"
    assert "the chat template does not know tools: they are written into the system message as JSON" in encoder.notes


def test_an_answer_that_the_template_does_not_end_is_ended(encoder_of, smollm):
    """Between turns the next turn's first token is the end, as in GLM."""
    (row,) = encoder_of(BARE).encode(chat(user(), answer(), user("And?"), answer("So.")))
    assert learned(smollm, row) == "Hello<|im_start|>So.<|im_end|>"


def test_an_end_of_conversation_behind_the_end_of_the_answer_is_not_learned(encoder_of, smollm):
    (row,) = encoder_of(RESTS).encode(chat(user(), answer(), user("And?"), answer("So.")))
    assert learned(smollm, row) == "Hello<|im_end|>So.<|im_end|>"


# --- templates that write a turn differently later


def test_only_the_last_turn_is_learned_if_earlier_ones_are_rewritten(encoder_of, smollm):
    encoder = encoder_of(STRIPS)
    (row,) = encoder.encode(chat(user(), answer(), user("And?"), answer("So.")))
    assert learned(smollm, row) == "<think>\n\n</think>\n\nSo.<|im_end|>"
    encoder.question(chat(user(), answer(), user("And?"), answer("So.")))
    assert [note for note in encoder.notes if note.startswith("1 conversation: only the last assistant turn")]


def test_a_single_turn_of_such_a_template_needs_no_note(encoder_of, smollm):
    encoder = encoder_of(STRIPS)
    (row,) = encoder.encode(chat(user(), answer()))
    assert learned(smollm, row) == "<think>\n\n</think>\n\nHello<|im_end|>"
    assert not [note for note in encoder.notes if "only the last" in note]


def test_a_thinking_part_that_the_prompt_opens_is_closed(encoder_of, smollm):
    encoder = encoder_of(THINKS)
    record = chat(user(), answer())
    (row,) = encoder.encode(record)
    assert learned(smollm, row) == "\n</think>\n\nHello<|im_end|>"
    assert is_prefix(encoder.question(record), row)


def test_thoughts_that_the_template_cuts_off_are_learned(encoder_of, smollm):
    (row,) = encoder_of(THINKS).encode(chat(user(), answer("<think>\nHm.\n</think>\n\nHello")))
    assert learned(smollm, row) == "Hm.\n</think>\n\nHello<|im_end|>"


def test_thoughts_without_an_answer_are_learned_too(encoder_of, smollm):
    (row,) = encoder_of(THINKS).encode(chat(user(), answer("<think>Hm.</think>")))
    assert learned(smollm, row) == "Hm.\n</think>\n\n<|im_end|>"


# --- training and inference see the same tokens

CONVERSATIONS = [
    (user(), answer()),
    (user("2 + 2"), answer("4"), user("and\n\n3 more?"), answer("\n7")),
    (
        {"role": "system", "content": " Be kind. "},
        user("naïve 😀"),
        answer("  two spaces"),
        user("x"),
        answer("1. a\n2. b\n"),
    ),
    (user(), answer("ends with <b>tags</b>"), user("<|im_end|> in a text"), answer("你好")),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize(
    ("name", "source"),
    [("smollm2", None), ("smollm2", BARE), ("smollm2", STRIPS), ("smollm2", THINKS), ("smollm2", RESTS),
     ("llama", INST), ("llama", None), ("phi3", None), ("gemma2", GEMMA), ("gemma2", None), ("qwen2", None),
     ("llama3_rope", None)],
)  # fmt: skip
def test_a_question_is_the_beginning_of_its_training_row(tiny, name, source, messages):
    tokenizer = tiny(name)
    template = ChatTemplate(source or tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    encoder = Encoder(tokenizer, template, 1024)
    record = chat(*messages)
    (row,), question = encoder.encode(record), encoder.question(record)
    assert is_prefix(question, row)
    assert np.array_equal(encoder.prompt(messages[:-1]), question.ids), "a chat must ask as training did"
    assert messages[-1]["content"].strip() in question.reference
    stop = row.labels[row.labels != IGNORED][-1]
    assert stop in tokenizer.stop_ids
    begins = list(row.ids).count(tokenizer.bos_id) if tokenizer.add_bos else 1
    assert begins == 1 or name == "llama3_rope", "bos stands once, at the beginning"
    if tokenizer.add_bos:
        assert row.ids[0] == tokenizer.bos_id


def test_a_first_question_is_encoded_as_its_text(encoder, smollm, smollm_template):
    record = chat(user("What is 2+2?"), answer("4"))
    text = smollm_template.render(record.messages[:1], add_generation_prompt=True)
    assert encoder.question(record).ids.tolist() == smollm.encode(text)


def test_the_reference_is_the_answer_without_its_end(encoder):
    assert encoder.question(chat(user(), answer("So.\nYes. "))).reference == "So.\nYes. "


def test_plain_text_asks_nothing(encoder):
    assert encoder.question(Record(text="Once.")) is None


# --- prompt and completion, plain text


def test_a_base_without_template_joins_prompt_and_completion_as_they_stand(smollm):
    encoder = Encoder(smollm, None, 1024)
    record = parse_row({"prompt": "2+2=", "completion": "4"}, "line 1").record
    (row,) = encoder.encode(record)
    assert smollm.decode(row.ids) == "2+2=4<|im_end|>"
    assert learned(smollm, row) == "4<|im_end|>"
    question = encoder.question(record)
    assert (question.reference, smollm.decode(question.ids)) == ("4", "2+2=")
    assert encoder.notes == [
        "target tokens: completions",
        "the base has no chat template: prompt and completion are joined as they stand",
    ]


@pytest.mark.parametrize(
    ("prompt", "completion", "is_told"),
    [("2 and 2 is", "four", True), ("2 and 2 is", " four", False), ("2 and 2:", "four", False), ("", "four", False)],
)
def test_a_prompt_that_runs_into_its_completion_is_warned_of(smollm, smollm_template, prompt, completion, is_told):
    row = parse_row({"prompt": prompt, "completion": completion}, "line 1").record
    bare, talking = Encoder(smollm, None, 1024), Encoder(smollm, smollm_template, 1024)
    for encoder in (bare, talking):
        encoder.encode(row)
    assert any("1 row run into one word" in warning for warning in bare.warnings) == is_told
    assert talking.warnings == []


def test_with_a_template_prompt_and_completion_are_turns(encoder, smollm):
    (row,) = encoder.encode(parse_row({"prompt": "2+2=", "completion": "4"}, "line 1").record)
    assert learned(smollm, row) == "4<|im_end|>"
    assert "<|im_start|>user\n2+2=<|im_end|>" in smollm.decode(row.ids)


def test_a_text_is_learned_whole_and_ended(encoder, smollm):
    (row,) = encoder.encode(Record(text="Once upon a time."))
    assert smollm.decode(row.ids) == "Once upon a time.<|im_end|>"
    assert np.array_equal(row.labels[:-1], row.ids[1:])


def test_a_text_that_ends_itself_is_not_ended_twice(encoder, smollm):
    (row,) = encoder.encode(Record(text="Once.<|im_end|>"))
    assert list(row.ids).count(smollm.eos_id) == 1


@pytest.mark.parametrize("name", ["smollm2", "llama"])
def test_a_long_text_is_cut_and_every_token_is_learned_once(tiny, name):
    tokenizer = tiny(name)
    text = "".join(f"{number} is a number. " for number in range(60))
    (whole,) = Encoder(tokenizer, None, 10_000).encode(Record(text=text))
    for seq_len in (8, 9, 64, len(whole.ids) - 1):
        rows = Encoder(tokenizer, None, seq_len).encode(Record(text=text))
        assert max(len(row.ids) for row in rows) <= seq_len
        targets = np.concatenate([row.labels for row in rows])
        assert np.array_equal(targets[targets != IGNORED], whole.ids[1:])
        assert sum(row.truncated_tokens for row in rows) == 0
        if tokenizer.add_bos:
            assert {int(row.ids[0]) for row in rows} == {tokenizer.bos_id}


def test_a_conversation_for_a_base_without_template_is_refused(smollm):
    with pytest.raises(BaseModelError, match="no chat template.*give rows with prompt and completion"):
        Encoder(smollm, None, 64).encode(chat(user(), answer()))


# --- truncation


def test_a_long_answer_is_cut_from_the_right(smollm, smollm_template):
    record = chat(user(), answer("word " * 100))
    (whole,) = Encoder(smollm, smollm_template, 1024).encode(record)
    (row,) = Encoder(smollm, smollm_template, 64).encode(record)
    assert np.array_equal(row.ids, whole.ids[:64])
    assert np.array_equal(row.labels[:-1], whole.labels[:63])
    assert row.labels[-1] == IGNORED
    assert row.truncated_tokens == len(whole.ids) - 64


def test_a_long_question_is_cut_from_the_left_so_that_the_answer_stays(smollm, smollm_template):
    (row,) = Encoder(smollm, smollm_template, 64).encode(chat(user("word " * 100), answer("Yes, sir.")))
    assert len(row.ids) == 64
    assert learned(smollm, row) == "Yes, sir.<|im_end|>"
    assert row.truncated_tokens > 0


def test_of_a_long_question_with_a_longer_answer_the_end_is_kept(smollm, smollm_template):
    (row,) = Encoder(smollm, smollm_template, 64).encode(chat(user("word " * 100), answer("no " * 100 + "yes")))
    assert len(row.ids) == 64
    assert learned(smollm, row).endswith("yes<|im_end|>")
    assert row.target_tokens == 63


def test_bos_survives_a_cut_from_the_left(tiny):
    llama = tiny("llama")
    template = ChatTemplate(llama.chat_template, llama.bos_token, llama.eos_token)
    (row,) = Encoder(llama, template, 16).encode(chat(user("and so on " * 20), answer("Yes")))
    assert row.ids[0] == llama.bos_id
    assert len(row.ids) == 16
    assert row.labels[-2] == llama.eos_id


# --- all records


def test_text_that_has_been_through_a_template_is_warned_of(smollm, smollm_template):
    encoder = Encoder(smollm, smollm_template, 64)
    encoder.encode(chat(user(), answer()))
    assert encoder.warnings == []
    encoder.encode(chat(user("[INST] Hi [/INST]"), answer()))
    encoder.encode(chat(user("<|im_start|>user Hi<|im_end|>"), answer()))
    (warning,) = encoder.warnings
    assert warning.startswith("marks of a chat template stand in the text of 2 rows, first [INST] in ")


def test_marks_of_turns_in_plain_text_are_told_and_those_of_another_template_are_a_warning(smollm, smollm_template):
    encoder = Encoder(smollm, smollm_template, 64)
    encoder.encode(Record(text="<p>Lines of a page.</p>", source="a line 1"))
    assert not any("marks" in said for said in (*encoder.notes, *encoder.warnings))
    encoder.encode(Record(text="<|im_start|>user\nHi<|im_end|>\n", source="a line 2"))
    assert encoder.warnings == []
    assert "marks of turns stand in the plain text of 1 row, first <|im_start|> in a line 2" in encoder.notes[1]
    encoder.encode(Record(text="[INST] Hi [/INST] Hello", source="a line 3"))
    encoder.encode(Record(text="### Human: Hi### Assistant: Hello", source="a line 4"))
    (warning,) = encoder.warnings
    assert warning.startswith(
        "marks of another chat template than the base's stand in the plain text of 2 rows, first [INST] in a line 3"
    )
    bare = Encoder(smollm, None, 64)
    bare.encode(Record(text="[INST] Hi [/INST] Hello", source="a line 3"))
    assert bare.warnings == []
    assert "teach answers alone" in bare.notes[1]


@pytest.mark.parametrize(
    ("template", "is_told"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.text }}{% endfor %}", True),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content if m.role == 'user' else 'ok' }}{% endfor %}", True),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content.title() }}{% endfor %}", False),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] | trim }}{% endfor %}", False),
    ],
)
def test_a_template_that_does_not_write_what_is_said_is_warned_of(encoder_of, template, is_told):
    encoder = encoder_of(template)
    encoder.encode(chat(user("Say it"), answer("<think>Why</think> Well then")))
    assert any("does not write all messages of 1 row" in warning for warning in encoder.warnings) == is_told


def test_answers_that_never_end_are_warned_of(encoder_of):
    encoder = encoder_of("{% for m in messages %}{{ m.role }}: {{ m.content }}<file_sep>{% endfor %}")
    encoder.encode(chat(user(), answer()))
    (warning,) = encoder.warnings
    assert warning.startswith("the last answer of 1 row ends with no token that ends an answer")
    encoder = encoder_of("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")
    encoder.encode(chat(user(), answer()))
    assert encoder.warnings == []  # the end of the document was put behind it


def test_records_the_template_refuses_are_left_out_with_the_reason(encoder_of):
    skipped = Skipped(rows=20)
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + RESTS
    records = [*[chat(user(), answer())] * 19, chat(user("no"), answer())]
    rows, _ = encode_all(records, encoder_of(refusing), skipped)
    assert (len(rows), skipped.count) == (19, 1)
    assert "not this" in skipped.found[0].problems[0]


def test_a_token_that_the_base_does_not_know_is_refused(smollm, smollm_template):
    last = smollm.last_id
    encoder = Encoder(smollm, smollm_template, 64, vocab_size=last)
    encoder.encode(chat(user(), answer()))
    text = smollm.decode([last])
    assert smollm.encode(text) == [last]
    for record in (chat(user(text), answer()), Record(text=text)):
        with pytest.raises(DataError, match=rf"token {last:,}, which the base does not know \(it has {last:,}\)"):
            encoder.encode(record)


def test_the_report_counts_what_became_of_the_records(smollm, smollm_template):
    records = [chat(user(), answer()), chat(user(), answer("word " * 100)), Record(text="Once.", source="b")]
    rows, report = encode_all(records, Encoder(smollm, smollm_template, 64))
    assert len(report.lengths) == len(rows) == 3
    assert list(report.lengths) == [len(row.ids) for row in rows]
    assert (report.tokens, report.longest) == (sum(report.lengths), 64)
    assert report.target_tokens == sum(row.target_tokens for row in rows)
    assert (report.truncated_rows, report.truncated_tokens) == (1, sum(row.truncated_tokens for row in rows))
    assert report.rows_without_labels == []


def test_rows_that_repeat_others_are_counted(encoder):
    _, report = encode_all([chat(user(text), answer()) for text in ("a", "b", "a", "c", "a")], encoder)
    assert report.copies == 2


def test_rows_without_labels_are_left_out_and_named(smollm, smollm_template):
    records = [chat(user(), answer()), Record(text="Once.", source="b.txt")]
    rows, report = encode_all(records, Encoder(smollm, smollm_template, 64, loss_on="completions"))
    assert (len(rows), report.rows_without_labels) == (1, ["b.txt"])


def test_data_without_any_label_is_refused(smollm, smollm_template):
    with pytest.raises(DataError, match=r"none of 1 row has a token to learn \(b\.txt\).*set loss_on to auto or all"):
        encode_all([Record(text="Once.", source="b.txt")], Encoder(smollm, smollm_template, 64, loss_on="completions"))


def test_conversations_the_template_refuses_are_named_together(encoder_of):
    refusing = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + RESTS
    records = [chat(user(), answer()), *[chat(user(), answer(), user(), answer())] * 2]
    with pytest.raises(DataError) as caught:
        encode_all(records, encoder_of(refusing))
    assert caught.value.problems == ("data line 1: the chat template of the base refuses this conversation: too long",)


def test_notes_say_what_the_template_adds(encoder, smollm):
    encoder.encode(chat(user(), answer()))
    encoder.encode(Record(text="Once."))
    assert encoder.notes == [
        "target tokens: all assistant turns and every token of plain text",
        'the chat template adds a system prompt where there is none: "You are a helpful AI assistant named SmolLM, '
        'trained by Hugging Face". Give a system message to replace it.',
    ]


def test_nothing_is_noted_of_what_did_not_happen(encoder, smollm, smollm_template):
    assert encoder.notes == []
    encoder.encode(chat({"role": "system", "content": "Be kind."}, user(), answer()))
    assert encoder.notes == ["target tokens: all assistant turns"]
    everything = Encoder(smollm, smollm_template, 64, loss_on="all")
    everything.encode(Record(text="Once."))
    assert everything.notes == ["target tokens: every token"]


def test_notes_tell_of_a_template_without_system_role_and_with_a_date(encoder_of):
    no_system = (
        "{{ strftime_now('%Y') }}{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}{% endfor %}"
    )
    encoder = encoder_of(no_system)
    encoder.encode(chat({"role": "system", "content": "Be kind."}, user(), answer()))
    assert encoder.notes[1].startswith("the chat template has no system role")
    assert encoder.notes[2].startswith("the chat template writes the date")


def test_the_general_records_are_a_few_thousand_tokens(encoder):
    _, report = encode_all(general_records(), encoder)
    assert 2_000 <= report.tokens <= 2_500
    assert report.longest < 128


# --- questions longer than the context


def test_a_question_longer_than_the_context_is_asked_without_its_oldest_turns(smollm, smollm_template):
    encoder = Encoder(smollm, smollm_template, 1024, context_tokens=128)
    system, turns = {"role": "system", "content": "Be kind."}, [user("Is it on the list?"), answer("It is, I think.")]
    long, short = (chat(system, *turns * count, user("And?"), answer("So.")) for count in (20, 1))
    assert len(Encoder(smollm, smollm_template, 1024).question(long).ids) > 128
    question = encoder.question(long)
    assert len(question.ids) <= 96
    assert (question.reference, smollm.decode(question.ids).count("Is it on the list?")) == ("So.", 3)
    assert np.array_equal(encoder.question(short).ids, Encoder(smollm, smollm_template, 1024).question(short).ids)
    assert encoder.context_warnings == [
        "1 conversation longer than the context of the base (128 tokens): asked without the oldest turns"
    ]


def test_a_question_that_is_too_long_alone_is_not_asked(smollm, smollm_template):
    encoder = Encoder(smollm, smollm_template, 1024, context_tokens=128)
    assert encoder.question(chat(user("Is it on the list? " * 40), answer("So."))) is None
    assert encoder.context_warnings == ["1 question longer than the context of the base (128 tokens): not answered"]


def test_a_prompt_is_encoded_as_the_training_row_begins(encoder, smollm):
    record = chat(user(), answer(), user("And?"), answer("So."))
    (row,) = encoder.encode(record)
    asked = encoder.opening(chat(*record.messages[:-1]))
    assert np.array_equal(asked, row.ids[: len(asked)])
    bare = Encoder(smollm, None, 1024)
    assert smollm.decode(bare.opening(Record(prompt="2+2="))) == "2+2="
    for each in (encoder, bare):
        assert smollm.decode(each.opening(Record(text="Once upon"))) == "Once upon"
    with pytest.raises(BaseModelError, match="no chat template"):
        bare.opening(chat(user()))


def test_rows_beyond_the_context_are_told(smollm, smollm_template):
    encoder = Encoder(smollm, smollm_template, 1024, context_tokens=128)
    encoder.encode(chat(user("Is it on the list? " * 40), answer("So.")))
    encoder.encode(Record(text="Once upon a time. " * 100))
    encoder.encode(chat(user(), answer()))
    [warning] = encoder.context_warnings
    assert "2 rows longer than the context of the base (128 tokens)" in warning
    assert "--seq-len 128 cuts them there" in warning
    encoder = Encoder(smollm, smollm_template, 128, context_tokens=128)
    encoder.encode(Record(text="Once upon a time. " * 100))
    assert encoder.context_warnings == []


def test_results_that_hold_their_tags_already_get_no_others():
    """As in the data of Hermes."""
    result = {"role": "tool", "content": "<tool_response>\n3\n</tool_response>"}
    written = write_tools([user(), answer("<tool_call>...</tool_call>"), result, {**RESULT, "content": "4"}], None)
    assert written[-1]["content"] == "<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>"
