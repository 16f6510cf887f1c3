"""Which dtype is chosen, by the rates of the machine."""

from pathlib import Path

import pytest

from thimble.backends.open import choose_store
from thimble.backends.torch import block_products, compute
from thimble.errors import ConfigError
from thimble.models.base import open_base
from thimble.models.machine import Machine

GGUF = Path(__file__).parents[2] / "fixtures" / "gguf"


def on_machine(monkeypatch, **flops):
    monkeypatch.setattr(compute, "machine", lambda: Machine("a processor", 2, flops, 1e10, 0.0))


def test_auto_takes_the_faster_of_the_float_types_and_says_why(monkeypatch):
    on_machine(monkeypatch, fp32=1e11, bf16=2e11, int8=4e11)
    assert compute.choose_compute("auto")[0] == "bf16"
    assert "bf16 200 GFLOP/s" in compute.choose_compute("auto")[1]
    on_machine(monkeypatch, fp32=1e11)
    assert compute.choose_compute("auto")[0] == "fp32"


def test_a_slow_choice_of_the_users_is_kept_and_told(monkeypatch):
    on_machine(monkeypatch, fp32=2e11, bf16=1e10)
    assert compute.choose_compute("bf16") == ("bf16", "bf16 was asked for, 20.0 times slower than auto here")
    on_machine(monkeypatch, fp32=2e11)  # the race dropped it
    assert compute.choose_compute("bf16") == ("bf16", "bf16 was asked for, far slower than auto here")


def test_gradients_in_int8_are_refused_on_a_processor_without_instructions_for_them(monkeypatch):
    on_machine(monkeypatch, fp32=1e11, bf16=2e11)
    with pytest.raises(ConfigError, match="compute is bf16-int8: .* no instructions for products of int8"):
        compute.choose_compute("bf16-int8")


def test_bf16_with_int8_gradients_that_is_slower_than_auto_is_told(monkeypatch):
    """Half of the work is bf16's: with one tenth of fp32's rate there, int8 cannot make up for it."""
    on_machine(monkeypatch, fp32=1e11, bf16=1e11, int8=2e11)
    assert compute.choose_compute("bf16-int8") == ("bf16-int8", "bf16-int8 was asked for")
    on_machine(monkeypatch, fp32=1e11, bf16=1e10, int8=4e11)
    found = compute.choose_compute("bf16-int8")
    assert found == ("bf16-int8", "bf16-int8 was asked for, 5.1 times slower than auto here")
    on_machine(monkeypatch, fp32=1e11, int8=4e11)
    assert compute.choose_compute("bf16-int8") == ("bf16-int8", "bf16-int8 was asked for, far slower than auto here")


def test_auto_takes_no_int8_however_fast_it_is(monkeypatch):
    on_machine(monkeypatch, fp32=1e11, bf16=2e11, int8=9e11)
    assert compute.choose_compute("auto")[0] == "bf16"


# ---- the store of int8 -----------------------------------------------------------------------------------------------


def store_of(file, wanted="auto", blocks="avx2", monkeypatch=None):
    monkeypatch.setattr(block_products, "whole_number_form", lambda: blocks)
    return choose_store(wanted, open_base(GGUF / f"{file}.gguf"), "int8")


def test_int8_multiplies_rows_where_the_processor_can_and_blocks_elsewhere(monkeypatch):
    on_machine(monkeypatch, fp32=1e11, int8=4e11)
    stores, why = store_of("llama_q8_0", monkeypatch=monkeypatch)
    assert stores == ("int8",)
    assert "--store file rounds no weight again" in why
    assert "--store file" not in store_of("llama", monkeypatch=monkeypatch)[1], "its weights are no blocks"
    assert store_of("llama_q8_0", "file", monkeypatch=monkeypatch)[0] == ("file",)
    on_machine(monkeypatch, fp32=1e11)
    stores, why = store_of("llama_q8_0", monkeypatch=monkeypatch)
    assert stores == ("file",)
    assert "multiplies the blocks of the file as they are" in why


@pytest.mark.parametrize(
    ("file", "wanted", "blocks", "said"),
    [
        ("llama_q8_0", "int8", "avx2", "no instructions for products of int8 .* or, in a new run, --store file, which"),
        (
            "llama",
            "int8",
            "avx2",
            "no instructions for products of int8 .* use --compute fp32, which decodes the rows$",
        ),
        ("llama", "file", "avx2", "the weights of llama.gguf are F32, no blocks that this processor multiplies; use"),
        ("llama", "auto", "avx2", "are F32, no blocks .*, and this processor has no instructions for products of int8"),
        ("llama_q8_0", "auto", "plain", "are Q8_0, no blocks that this processor multiplies, and this processor has"),
    ],
)
def test_int8_that_cannot_run_is_refused_by_name(file, wanted, blocks, said, monkeypatch):
    on_machine(monkeypatch, fp32=1e11, bf16=2e11)
    with pytest.raises(ConfigError, match=f"compute is int8.*{said}"):
        store_of(file, wanted, blocks, monkeypatch)


def test_the_rates_of_this_machine_are_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = compute.machine()
    assert found.flops["fp32"] > 1e9
    assert found.copy_bytes > 1e8
    assert compute.machine() == found
