"""What happens around a run: full disks, memory that runs out, Ctrl-Z, damaged bases, dirty rows."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import thimble
from thimble.backends.torch.session import TorchSession
from thimble.commands import train as command
from thimble.core.metrics import LossSum
from thimble.errors import ConfigError, RunError
from thimble.files.tensors import open_tensors
from thimble.training import memory_plan, run_folder, sink
from thimble.training.checkpoint import latest_checkpoint, locked
from thimble.training.tasks import text

QUICK = {"seq_len": 64, "batch_tokens": 64, "max_steps": 8, "max_new_tokens": 2, "compute": "fp32", "rank": 4}
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def train(examples, tiny_base, tmp_path):
    def run(name="run", **options):
        return thimble.train(examples, base=tiny_base, out=str(tmp_path / name), **{**QUICK, **options})

    return run


def adapter_of(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


# ---- full disks -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(train, tmp_path, monkeypatch):
    whole, times = sink.save_checkpoint, []

    def save(*args):
        times.append(args[1])
        if len(times) in (2, 3):
            raise FULL
        whole(*args)

    monkeypatch.setattr(sink, "save_checkpoint", save)
    report = train(checkpoint_every_steps=2)
    assert (report.status, report.steps, times) == ("done", 8, [2, 4, 6, 8])
    warnings = [text for text in report.messages["warning"] if "cannot be written" in text]
    assert len(warnings) == 2
    assert "step 6 cannot be written (No space left on device): the run goes on, and that of step 2 is" in warnings[1]
    train("other")
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "other")


def test_a_result_that_cannot_be_written_is_an_honest_failure_that_can_be_resumed(train, tmp_path, monkeypatch):
    publish = run_folder.publish_adapter
    monkeypatch.setattr(run_folder, "publish_adapter", lambda *a: (_ for _ in ()).throw(FULL))
    with pytest.raises(RunError, match=r"cannot be written to .*No space left.*--resume, which goes on from step 8"):
        train()
    assert latest_checkpoint(tmp_path / "run").step == 8
    assert not (tmp_path / "run" / "adapter").exists()
    monkeypatch.setattr(run_folder, "publish_adapter", publish)
    assert train(resume=True).status == "done"
    train("other")
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "other")


def test_steps_that_found_no_room_are_in_the_log_as_soon_as_there_is_some(tmp_path, monkeypatch):
    log = run_folder.StepLog(tmp_path / "metrics.jsonl")
    log.add({"step": 1})
    log._stream.close()  # a write that fails
    monkeypatch.setattr(run_folder, "write_text", lambda *a: (_ for _ in ()).throw(FULL))
    log.add({"step": 2})
    with pytest.raises(OSError, match="No space"):
        log.flush()
    monkeypatch.undo()
    log.add({"step": 3})
    assert [row["step"] for row in run_folder.read_steps(tmp_path / "metrics.jsonl")] == [1, 2, 3]


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def scarce(monkeypatch):
    """Let memory run out in micro-batches of more than so many tokens."""

    def limit(most_tokens):
        true = TorchSession.gradient

        def gradient(session, state, work, *rest):
            if max(batch.tokens for share in work.shares for batch in share) > most_tokens:
                raise MemoryError("you tried to allocate 12345 bytes")
            return true(session, state, work, *rest)

        monkeypatch.setattr(TorchSession, "gradient", gradient)

    return limit


def test_a_step_that_runs_out_of_memory_is_taken_in_smaller_parts(train, tmp_path, scarce):
    train("whole", valid_split=0, batch_tokens=256, seq_len=64)
    scarce(128)
    report = train(valid_split=0, batch_tokens=256, seq_len=64)
    assert any(
        "memory ran out in step 1: from here on in micro-batches of" in text for text in report.messages["warning"]
    )
    ours, other = (open_tensors(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "whole"))
    for name in ours.tensors:  # the same sums in another order; Adam makes much of the last digit of a tiny gradient
        np.testing.assert_allclose(ours.read(name), other.read(name), atol=2e-3)


def test_a_step_that_does_not_fit_at_all_ends_the_run_with_what_to_do(train, tmp_path, scarce):
    train(max_steps=3, checkpoint_every_steps=1)
    (tmp_path / "run" / "report.json").unlink()
    scarce(4)
    with pytest.raises(RunError, match=r"ran out \(in step 4, in the smallest parts.*--resume goes on from step 3"):
        train(max_steps=5, resume=True, eval_rows=0)


def test_torch_telling_of_memory_is_understood():
    from thimble.backends.torch.memory import out_of_memory

    def refuse(text):
        raise RuntimeError(text)

    told = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    with pytest.raises(MemoryError):
        out_of_memory(refuse)(told + "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)")
    with pytest.raises(RuntimeError, match="shapes"):
        out_of_memory(refuse)("shapes do not match")


def test_what_is_measured_after_a_smaller_step_is_measured_in_smaller_parts(train, monkeypatch, scarce):
    """Base and result are measured with the execution plan there is at that time."""
    true, found = text.measure, []

    def measure(session, adapter, validation, execution, *rest):
        found.append(execution.micro_tokens)
        return true(session, adapter, validation, execution, *rest)

    monkeypatch.setattr(text, "measure", measure)
    scarce(128)
    train(batch_tokens=256, seq_len=64)
    before, after = found
    assert before == 256
    assert after <= 128


# ---- pauses --------------------------------------------------------------------------------------------------------


@pytest.fixture
def process(examples, tiny_base, tmp_path):
    """A run of its own process that takes long, and a way to wait for what it says."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**QUICK, "max_steps": 100_000}.items()]
    command = [sys.executable, "-m", "thimble", "train", str(examples), "--base", tiny_base, "--out", "run", *flags]
    told = open(tmp_path / "told", "w+")  # noqa: SIM115
    running = subprocess.Popen(command, cwd=tmp_path, stdout=told, stderr=told)

    def until(text, seconds=180):
        end = time.monotonic() + seconds
        while text not in (tmp_path / "told").read_text():
            assert time.monotonic() < end, (tmp_path / "told").read_text()
            assert running.poll() is None, (tmp_path / "told").read_text()
            time.sleep(0.02)

    yield running, until
    running.kill()
    running.wait()
    told.close()


def state_of(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ctrl_z_saves_a_checkpoint_and_stops_the_process_until_it_is_continued(process, tmp_path):
    running, until = process
    until("step 1/")
    os.kill(running.pid, signal.SIGTSTP)
    until("with a checkpoint: asked for with Ctrl-Z")
    end = time.monotonic() + 60
    while state_of(running) != "T":
        assert time.monotonic() < end
        time.sleep(0.02)
    step = latest_checkpoint(tmp_path / "run").step
    os.kill(running.pid, signal.SIGCONT)
    until("going on after a pause of")
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(60) == 143
    assert latest_checkpoint(tmp_path / "run").step >= step


# ---- bases and data -------------------------------------------------------------------------------------------------


def test_a_base_with_a_weight_that_is_not_finite_is_named_before_anything_is_learned(examples, tiny_base, tmp_path):
    info = open_tensors(tiny_base).tensors["blk.1.ffn_up.weight"]
    whole = bytearray(Path(tiny_base).read_bytes())
    whole[info.offset : info.offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "bad.gguf").write_bytes(whole)
    with pytest.raises(RunError, match=r"NaN or Inf in model\.layers\.1\.mlp\.up_proj\.weight: copy or convert it"):
        thimble.train(examples, base=str(tmp_path / "bad.gguf"), out=str(tmp_path / "run"), **QUICK)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(("loss", "is_odd"), [(8.0, False), (12.0, True)])
def test_a_base_that_is_far_worse_than_guessing_on_the_rows_is_warned_of(train, monkeypatch, loss, is_odd):
    monkeypatch.setattr(text, "measure", lambda *a: (LossSum(loss, 1), []))  # guessing among its 320 tokens: 5.8
    warnings = train().messages["warning"]
    assert any("on the validation rows, worse than guessing" in told for told in warnings) == is_odd


def test_rows_that_are_left_out_are_listed_with_the_reason(tiny_base, tmp_path):
    rows = [{"prompt": f"say {n} ", "completion": f"{n} it is"} for n in range(20)]
    lines = [*map(json.dumps, rows), '{"prompt": "x"']
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    report = thimble.train(tmp_path / "mine.jsonl", base=tiny_base, out=str(tmp_path / "run"), **QUICK)
    (line,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == "mine.jsonl line 21"
    assert "is not valid JSON" in json.loads(line)["problem"]
    assert report.skipped_rows == 1
    assert any("1 of 21 rows cannot be used and are left out" in text for text in report.messages["warning"])


def test_data_and_base_that_are_moved_away_during_a_run_do_not_cost_its_result(examples, tiny_base, tmp_path):
    base = tmp_path / "base.gguf"
    base.write_bytes(Path(tiny_base).read_bytes())

    def hear(event):
        if event.kind == "step" and event.data["step"] == 2:
            base.unlink()
            examples.unlink()

    report = thimble.train(examples, base=str(base), out=str(tmp_path / "run"), on_event=hear, **QUICK)
    assert report.status == "done"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["base"]["sha256"] is None
    assert len(manifest["data"][str(examples)]) == 64


def test_a_run_is_locked_before_the_checkpoint_to_resume_is_read(train, tmp_path, monkeypatch):
    train(checkpoint_every_steps=2)
    (tmp_path / "run" / "report.json").unlink()
    monkeypatch.setattr(command, "plan_run", lambda *a: pytest.fail("the checkpoint was read"))
    with locked(tmp_path / "run"), pytest.raises(ConfigError, match="in which another run is at work"):
        train(resume=True)


def test_a_resumed_run_takes_its_steps_as_it_began_them(train, tmp_path, monkeypatch):
    train("whole", valid_split=0, batch_tokens=256)
    taken = []
    train(
        valid_split=0, batch_tokens=256, should_stop=lambda: len(taken) >= 3,
        on_event=lambda event: taken.append(1) if event.kind == "step" else None,
    )  # fmt: skip
    plans = memory_plan.execution_plans
    monkeypatch.setattr(
        memory_plan, "execution_plans", lambda *a: plans(*a)[-1:]
    )  # as if the machine had little memory free today
    report = train(valid_split=0, batch_tokens=256, resume=True)
    assert not any("digits" in text for text in report.messages["warning"])
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "whole")


def test_a_second_run_in_a_folder_is_refused_before_the_base_is_loaded(train, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "open_session", lambda *a: pytest.fail("the base was loaded"))
    with locked(tmp_path / "run"), pytest.raises(ConfigError, match="in which another run is at work"):
        train()


def test_a_run_that_fails_before_anything_is_written_leaves_no_folder(train, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "open_session", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train()
    assert not (tmp_path / "run").exists()


def test_a_report_of_another_version_is_read_as_far_as_it_is_known(train, tmp_path):
    train()
    path = tmp_path / "run" / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": 1}))
    assert train(resume=True).steps == 8
