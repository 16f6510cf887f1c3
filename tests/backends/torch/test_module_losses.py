"""What modules are trained on, against plain loops; texts run in parts of like length, with the same results."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from encoders import VOCABULARY, write_encoder
from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.module_losses import LOSSES, TEMPERATURE, by_length, run
from thimble.backends.torch.module_session import ModuleTorchSession
from thimble.core.method import Method
from thimble.files.peft import save_adapter
from thimble.models.execution import ExecutionPlan


def drawn(count, width=6, seed=0):
    made = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32))
    return functional.normalize(made, dim=-1)


def targets(pairs, content, score=None):
    found = {"pair": torch.arange(2 * pairs).reshape(2, -1).T, "content": torch.tensor(content)}
    return found if score is None else found | {"score": torch.tensor(score)}


def by_hand(made, count, content, wrong):
    """Nats of each row; `wrong` says whether text j is a wrong answer to text i."""
    nats = []
    for row in range(count):
        ways = []
        for own, other, candidates in (
            (row, count + row, range(count, len(made))), (count + row, row, range(count))
        ):  # fmt: skip
            sums = [float(made[own] @ made[place]) / TEMPERATURE for place in candidates if wrong(own, place)]
            right = float(made[own] @ made[other]) / TEMPERATURE
            ways.append(math.log(math.exp(right) + sum(map(math.exp, sums))) - right)
        nats.append(sum(ways) / 2)
    return nats


def test_each_text_finds_its_other_half_among_those_of_its_batch():
    made = drawn(8)
    found = LOSSES["pairs"].rows(made, targets(4, range(8)))
    expected = by_hand(made, 4, range(8), lambda own, place: place % 4 != own % 4)
    assert found.nats.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.targets.tolist() == [1] * 4


def test_explicit_negatives_are_wrong_answers_to_every_anchor_and_to_nothing_else():
    made = drawn(11)
    found = LOSSES["pairs"].rows(made, targets(4, range(11)))
    expected = by_hand(made, 4, range(11), lambda own, place: place >= 8 or place % 4 != own % 4)
    assert found.nats.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_what_is_right_too_is_no_wrong_answer():
    """Rows 0 and 1 have one answer, rows 2 and 3 one question; a negative is that answer, another that question."""
    content = [0, 1, 2, 2, 4, 4, 6, 7, 4, 2, 9]
    made = drawn(11, seed=1)
    alike = {frozenset(pair) for pair in ((0, 5), (1, 4), (2, 7), (3, 6), (0, 8), (1, 8), (2, 9), (3, 9))}
    found = LOSSES["pairs"].rows(made, targets(4, content))

    def wrong(own, place):
        return frozenset((own, place)) not in alike and not (place < 8 and place % 4 == own % 4)

    assert found.nats.tolist() == pytest.approx(by_hand(made, 4, content, wrong), rel=1e-5)


def test_pairs_with_scores_are_to_be_in_their_order():
    made, score = drawn(10, seed=2), [0.5, 3.0, 3.0, 1.0, 4.0]
    cosines = [float(made[row] @ made[5 + row]) for row in range(5)]
    expected = []
    for row in range(5):
        terms = []
        for other in range(5):
            if score[row] != score[other]:
                gap = cosines[other] - cosines[row] if score[row] > score[other] else cosines[row] - cosines[other]
                terms.append(math.exp(gap / TEMPERATURE))
        expected.append(math.log(1 + sum(terms)))
    found = LOSSES["pairs"].rows(made, targets(5, range(10), score))
    assert found.nats.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


# ---- texts in a module ----------------------------------------------------------------------------------------------


def texts(count, seed=0):
    """Tokens of uneven length, padded to the longest."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 24, count)
    mask = (np.arange(24) < lengths[:, None]).astype(np.int64)
    return {"input_ids": random.integers(5, len(VOCABULARY), (count, 24)) * mask, "attention_mask": mask}


class Texts(torch.nn.Module):
    def forward(self, input_ids, attention_mask):
        return input_ids


@pytest.mark.parametrize("lengths", [[5, 7, 6], [5, 24, 6, 23, 4, 5]])
def test_rows_stand_where_they_stood_in_one_part_or_in_several(lengths):
    mask = (torch.arange(24) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": mask * torch.arange(1, len(lengths) + 1)[:, None], "attention_mask": mask}
    firsts = run(Texts(), inputs, lambda made, part: part["input_ids"][:, 0])
    assert firsts.tolist() == list(range(1, len(lengths) + 1))
    assert len(by_length(inputs)) == (1 if len(lengths) == 3 else 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def session(folder):
    from transformers import BertModel

    found = ModuleTorchSession(BertModel.from_pretrained(folder, add_pooling_layer=False), "pairs")
    found.attach(rank=4, seed=1)
    return found


def test_texts_in_parts_give_what_they_give_in_one_padded_batch(folder):
    inputs = {name: torch.from_numpy(values) for name, values in texts(20).items()}
    parts = by_length(inputs)
    assert len(parts) > 2
    assert sum(part["input_ids"].numel() for _, part in parts) < 0.8 * inputs["input_ids"].numel()
    module = session(folder).module
    with torch.no_grad():
        found = LOSSES["pairs"].output(module, inputs, {})
        mask = inputs["attention_mask"][..., None]
        hidden = module(**inputs).last_hidden_state * mask
    expected = functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_step_that_does_not_fit_is_that_of_one_large_batch(folder):
    own = session(folder)
    pair = np.arange(16).reshape(2, -1).T
    batch = ModuleBatch(texts(19), {"pair": pair, "content": np.arange(19)}, range(8))
    state = own.start(own.fresh_adapter(), Method(0.0, 1.0, 0.1, False, 1.0, 0, 0.999))
    work = Work([[batch]], 8)
    whole, part = (
        own.gradient(state, work, Objective(), ExecutionPlan("dense", 1, tokens, tokens), StepKey(0, 3))
        for tokens in (10_000, 60)
    )
    assert whole.loss.tokens == part.loss.tokens == 8
    # Dropout of adapters is drawn for each part, so that only without it both are the same.
    state = own.start(own.fresh_adapter(), Method(0.0, 1.0, 0.0, False, 1.0, 0, 0.999))
    whole, part = (
        own.gradient(state, work, Objective(), ExecutionPlan("dense", 1, tokens, tokens), StepKey(0, 3))
        for tokens in (10_000, 60)
    )
    assert part.loss.nats == pytest.approx(whole.loss.nats, rel=1e-5)
    np.testing.assert_allclose(part.flat, whole.flat, atol=1e-6 * np.abs(whole.flat).max() + 1e-7)
    assert np.abs(whole.flat).max() > 0


# ---- beside PEFT ----------------------------------------------------------------------------------------------------


def peft_losses(folder, adapter, batches, rate):
    """The losses of PEFT with PyTorch's AdamW, each step one padded batch, from the same A and B."""
    import peft
    from transformers import AutoModel

    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(folder), adapter, is_trainable=True).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser, losses = torch.optim.AdamW(trained, rate, weight_decay=0.0), []
    for batch in batches:
        inputs = {name: torch.from_numpy(values) for name, values in batch.inputs.items()}
        mask = inputs["attention_mask"][..., None]
        hidden = model(**inputs).last_hidden_state * mask
        first, second = functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1).chunk(2)
        near, own = first @ second.T / TEMPERATURE, torch.arange(len(first))
        loss = (functional.cross_entropy(near, own) + functional.cross_entropy(near.T, own)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def our_losses(own, batches, rate):
    state, losses = own.start(own.fresh_adapter(), Method(0.0, 1.0, 0.0, False, 1.0, 0, 0.999)), []
    for step, batch in enumerate(batches):
        work = Work([[batch]], len(batch.numbers))
        gradient = own.gradient(state, work, Objective(), ExecutionPlan("dense", 1, 9999, 9999), StepKey(0, step))
        state = own.apply(state, gradient, rate)
        losses.append(gradient.loss.mean)
    return losses


def test_twenty_steps_have_the_losses_of_peft(folder, tmp_path):
    pytest.importorskip("peft")
    own = session(folder)
    save_adapter(own.fresh_adapter(), tmp_path / "adapter")
    batches = [
        ModuleBatch(texts(16, seed), {"pair": np.arange(16).reshape(2, -1).T, "content": np.arange(16)}, range(8))
        for seed in range(20)
    ]
    theirs = peft_losses(folder, tmp_path / "adapter", batches, 1e-3)
    np.testing.assert_allclose(our_losses(own, batches, 1e-3), theirs, atol=1e-4)
    assert len(set(theirs)) == 20


def test_rows_of_a_class_count_as_its_weight_says():
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0, 0])
    weights = torch.tensor([0.5, 2.0, 3.0])
    found = LOSSES["labels"].rows(logits, {"labels": labels, "weights": weights[labels]})
    torch.testing.assert_close(found.nats, functional.cross_entropy(logits, labels, weights, reduction="none"))
    assert found.targets.tolist() == [1] * 6
