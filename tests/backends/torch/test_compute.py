"""Which dtype is chosen, by the rates of the machine."""

import pytest

from thimble.backends.torch import compute
from thimble.errors import ConfigError
from thimble.models.machine import Machine


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


def test_int8_is_refused_on_a_processor_without_instructions_for_it(monkeypatch):
    on_machine(monkeypatch, fp32=1e11, bf16=2e11)
    with pytest.raises(ConfigError, match="no instructions for products of int8"):
        compute.choose_compute("int8")


def test_the_rates_of_this_machine_are_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = compute.machine()
    assert found.flops["fp32"] > 1e9
    assert found.copy_bytes > 1e8
    assert compute.machine() == found
