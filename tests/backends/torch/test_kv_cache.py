"""Keys and values in int8: near what they round, the same in any pieces, as small as planned; how a cache grows."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from families import make_hf_folder
from samples import make_adapter
from thimble.backends.open import open_session
from thimble.backends.session import ForwardRow, Pass
from thimble.backends.torch import gang, paged
from thimble.backends.torch.attention import AttentionSpec
from thimble.backends.torch.kv_cache import PIECE_BYTES, PRIVATE, KvCache
from thimble.backends.torch.session import TorchSession
from thimble.data.model import open_model
from thimble.errors import ConfigError
from thimble.models.base import open_base
from thimble.models.cost import cache_token_bytes, int8_cache_token_bytes

IDS = np.random.default_rng(2).integers(3, 290, 75).astype(np.int32)  # the last of three blocks is not full


@pytest.fixture
def whole_numbers(fixture_path):
    return TorchSession(open_base(fixture_path("llama_q8_0")), "fp32", "file", decode="int8", cache_type="int8")


@pytest.fixture
def fixture_path(request):
    return lambda name: request.path.parents[2] / "fixtures" / "gguf" / f"{name}.gguf"


def read(session, sizes, active=None, is_written=False, cache=None):
    """Logits after each token of IDS, read in pieces of some sizes."""
    cache, found, at = cache or session.new_cache(), [], 0
    blocks = tuple(range(-(-len(IDS) // cache.block_tokens)))
    cache.reserve(len(blocks))
    for size in sizes:
        row = ForwardRow(size, blocks, at, len(IDS), active or session.load(None), is_written)
        [(logits, _)] = session.forward([Pass(IDS[at : at + size], [row], range(size))], cache, 1)
        found.append(logits)
        at += size
    return np.concatenate(found)


def assert_near(found, exact, tolerance):
    """By the root of the mean square."""
    assert 0 < np.linalg.norm(found - exact) <= tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("sizes", [[75], [20, 1, 54], [7] * 10 + [5]])
def test_prompts_in_float_stay_near_what_they_are_without_rounding(family, sizes, tmp_path):
    base = open_base(make_hf_folder(family, tmp_path))
    exact = TorchSession(base, "fp32", "dense").logits(IDS)
    assert_near(read(TorchSession(base, "fp32", "dense", cache_type="int8"), sizes), exact, 0.02)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
@pytest.mark.parametrize(("compute", "tolerance"), [("fp32", 0.02), ("bf16", 0.03)])  # bf16 alone: 0.014
def test_answers_stay_near_what_they_are_without_rounding(family, compute, tolerance, tmp_path):
    base = open_base(make_hf_folder(family, tmp_path))
    exact = TorchSession(base, "fp32", "dense").logits(IDS)
    found = read(TorchSession(base, compute, "dense", cache_type="int8"), [5] * 15, is_written=True)
    assert_near(found, exact, tolerance)


def test_a_token_is_the_same_in_any_pieces_beside_anything_on_any_number_of_threads(whole_numbers, monkeypatch):
    session = whole_numbers
    active = session.load(make_adapter(session._base))
    one_by_one = read(session, [1] * 75, active)
    assert not np.array_equal(one_by_one, read(session, [1] * 75))
    for sizes in ([75], [33, 42], [2, 31, 42], [25] * 3):
        assert np.array_equal(read(session, sizes, active), one_by_one)
    monkeypatch.setattr(gang, "usable_threads", lambda: 1)
    assert np.array_equal(read(session, [33, 42], active), one_by_one)


@pytest.mark.parametrize("kind", ["F32", "BF16", "I8"])
def test_what_is_put_into_a_block_comes_out_of_it_rounded_once(kind):
    """Against the formula in numpy: q = round(x · 127 / max |x|) for each token and head."""
    heads, dim, count = 2, 6, 45
    cache = KvCache(3, AttentionSpec(4, heads, dim, 1.0), kind)
    cache.reserve(2)
    rng = np.random.default_rng(3)
    keys, values = rng.standard_normal((2, count, heads, dim)).astype(np.float32)
    keys[7] = 0
    _put(cache, keys, values)
    to_keys, to_values = np.empty((heads, dim, 64), np.float32), np.empty((heads, 64, dim), np.float32)
    paged.gather(0, heads, cache.addresses[:2], *cache.layer(1), count, to_keys, to_values)
    for found, x in ((to_keys.transpose(2, 0, 1), keys), (to_values.transpose(1, 0, 2), values)):
        assert not found[count:].any()
        if kind == "I8":
            scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
            rounded = np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)) * scale
            np.testing.assert_allclose(found[:count], rounded, rtol=1e-5, atol=1e-7)
        else:
            expected = x if kind == "F32" else torch.from_numpy(x).bfloat16().float().numpy()
            assert np.array_equal(found[:count], expected)


def _put(cache, keys, values):
    """Put keys and values (tokens, heads, dim) of a layer in the middle, as a pass over a prompt does."""
    count, heads, dim = keys.shape
    qkv = np.concatenate([np.zeros((count, 2 * heads, dim), np.float32), keys, values], 1)
    places = np.arange(count)
    paged.add_heads(
        0, count, qkv, np.zeros(qkv.shape[1:], np.float32), np.zeros((count, 0), np.float32),
        np.zeros((count, 0), np.float32), np.float32(1), cache.addresses[places // 32], places % 32, *cache.layer(1),
        np.empty((count, heads, 2, dim), np.float32),
    )  # fmt: skip


def test_a_nan_is_not_hidden(whole_numbers):
    active = whole_numbers.load(make_adapter(whole_numbers._base))
    next(f for path, f in active.layers.items() if path.endswith("k_proj")).B.fill_(torch.nan)
    assert np.isnan(read(whole_numbers, [75], active)).all()


@pytest.mark.parametrize("cache_type", ["float", "int8"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_cache_takes_what_is_planned_for_it(cache_type, compute, tiny_base):
    base = open_base(tiny_base)
    cache = TorchSession(base, compute, "file", cache_type=cache_type).new_cache()
    cache.reserve(1)
    planned = cache_token_bytes(base.spec, compute) if cache_type == "float" else int8_cache_token_bytes(base.spec)
    assert np.diff(cache.addresses)[0] == planned * cache.block_tokens


def test_a_cache_grows_without_moving_what_is_there(whole_numbers, monkeypatch):
    expected = read(whole_numbers, [75])
    monkeypatch.setattr("thimble.backends.torch.kv_cache.PIECE_BYTES", 1)  # a piece for each block
    cache = whole_numbers.new_cache()
    cache.reserve(1)
    before = cache.addresses.copy()
    cache.reserve(40)
    assert np.array_equal(cache.addresses[:1], before)
    assert len(cache.addresses) == 40
    assert np.array_equal(read(whole_numbers, [33, 42], cache=cache), expected)


@pytest.mark.skipif(not PRIVATE, reason="this system takes no pages back")
def test_memory_of_blocks_that_hold_nothing_goes_back_to_the_system(whole_numbers):
    cache, most = whole_numbers.new_cache(), 4 * PIECE_BYTES
    cache.reserve(1)
    blocks = most // int(np.diff(cache.addresses)[0])
    cache.reserve(blocks)
    for piece in cache._pieces:
        piece.fill_(7)
    kept = [0, 1, blocks // 2, cache.blocks - 1]
    before = own_bytes()
    cache.discard([block for block in range(cache.blocks) if block not in kept])
    assert own_bytes() <= before - 0.9 * most
    assert all((cache._block(block) == 7).all() for block in kept)


def own_bytes():
    """Memory of this process that no file backs."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def test_a_block_is_copied_with_its_scales(whole_numbers):
    session, size = whole_numbers, 32
    cache, bare = session.new_cache(), session.load(None)
    expected = read(session, [size, 75 - size], cache=cache)[size:]
    cache.reserve(4)
    cache.copy(0, 3)
    row = ForwardRow(75 - size, (3, 1, 2), size, len(IDS), bare)
    [(logits, _)] = session.forward([Pass(IDS[size:], [row], range(75 - size))], cache, 1)
    assert np.array_equal(logits, expected)


def test_bases_that_run_through_transformers_refuse_it(tmp_path):
    from other_families import CONFIGS, save

    model = open_model(str(save(CONFIGS["gpt2"](), tmp_path)))
    with pytest.raises(ConfigError, match="--cache-type int8: .*gpt2"):
        open_session(model, "fp32", "dense", cache_type="int8")
