"""Rotary position embeddings: the angles of every scaling that the families use."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError
from thimble.files.untrusted import shown
from thimble.models.fields import MOST, flag, number, positives

MOST_POSITIONS = MOST["max_position_embeddings"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer (Su et al., arXiv:2104.09864)."""

    inv_freq: NDArray[np.float64]  # float64 (dim / 2,), angle per position of each pair (i, i + dim / 2)
    scale: float = 1.0  # factor of both cos and sin (1 but for YaRN and LongRoPE)
    # used instead when a row is longer than `long_from` tokens (LongRoPE), else None
    long_inv_freq: NDArray[np.float64] | None = None
    long_from: int = 0  # length up to which `inv_freq` holds


def make_rope(scaling: Mapping[str, Any], fields: Mapping[str, Any], head_dim: int, rotary_dim: int = 0) -> Rope:
    """Angles by `rope_parameters` (transformers 5) or `rope_scaling` (4), and the config for what those leave out.

    Args:
        scaling: The settings.
        fields: The config.
        head_dim: Width of a head.
        rotary_dim: How much of it is turned; 0 is a share that the settings say, or else all.

    Returns:
        The angles.

    Raises:
        BaseModelError: If a setting is missing, or none that a model has.
    """
    theta = number(scaling, "rope_theta", 2, 1e15, number(fields, "rope_theta", 2, 1e15, 1e4))
    share = number(scaling, "partial_rotary_factor", 1e-3, 1, number(fields, "partial_rotary_factor", 1e-3, 1, 1.0))
    dim = rotary_dim or int(head_dim * share)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise BaseModelError(f"positions turn {dim} numbers of each head of {head_dim}: expected an even number from 2")
    inv_freq = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    kind = rope_type(scaling)
    if kind == "default":
        return Rope(inv_freq)
    if kind == "linear":
        return Rope(inv_freq / number(scaling, "factor", 1e-3, 1e6))
    if kind == "llama3":
        return Rope(_llama3(inv_freq, scaling, fields))
    if kind == "longrope":
        return _longrope(inv_freq, scaling, fields)
    if kind == "yarn":
        return _yarn(inv_freq, scaling, fields, theta, dim)
    raise BaseModelError(
        f"the base scales its positions by {shown(kind)}: supported are linear, llama3, longrope and yarn"
    )


def rope_type(scaling: Mapping[str, Any]) -> Any:
    """The type that settings name, under its name of today."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return "longrope" if kind == "su" else kind


def yarn_scale(factor: float, share: float = 1.0) -> float:
    """How much louder attention becomes when positions are stretched by a factor (arXiv:2309.00071, section 3.4)."""
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(
    inv_freq: NDArray[np.float64], scaling: Mapping[str, Any], fields: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Llama 3.1: slow angles are divided by `factor`, fast ones kept, with a smooth passage between."""
    low = number(scaling, "low_freq_factor", 1e-3, 1e6)
    high = number(scaling, "high_freq_factor", 1.001 * low, 1e9)
    factor = number(scaling, "factor", 1e-3, 1e6)
    original, _ = _original(scaling, fields, "max_position_embeddings")
    turns = original * inv_freq / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def _longrope(inv_freq: NDArray[np.float64], scaling: Mapping[str, Any], fields: Mapping[str, Any]) -> Rope:
    """Phi-3 long context: one divisor per angle, other divisors beyond the original length (arXiv:2402.13753)."""
    original, positions = _original(scaling, fields, "original_max_position_embeddings")
    factor = number(scaling, "factor", 1e-3, 1e6, positions / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    loudness = number(scaling, "attention_factor", 1e-3, 1e3, default)
    short, long = (positives(scaling, f"{name}_factor", len(inv_freq)) for name in ("short", "long"))
    return Rope(inv_freq / short, loudness, inv_freq / long, int(original))


def _original(scaling: Mapping[str, Any], fields: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Length that the base was first made for, and the one it is stretched to."""
    positions = number(fields, "max_position_embeddings", 2, MOST_POSITIONS, 2048)
    key = "original_max_position_embeddings"  # beside the settings it counts more than among them
    return number({key: fields.get(key) or scaling.get(key) or fields.get(name)}, key, 2, MOST_POSITIONS), positions


def _yarn(
    inv_freq: NDArray[np.float64], scaling: Mapping[str, Any], fields: Mapping[str, Any], theta: float, dim: int
) -> Rope:
    """YaRN (arXiv:2309.00071, section 3.2): interpolate angles that turn seldom, keep those that turn often."""
    original, positions = _original(scaling, fields, "max_position_embeddings")
    factor = number(scaling, "factor", 1e-3, 1e6, positions / original)
    shares = [number(scaling, name, 1e-3, 1e3, 0.0) for name in ("mscale", "mscale_all_dim")]
    default = yarn_scale(factor, shares[0]) / yarn_scale(factor, shares[1]) if all(shares) else yarn_scale(factor)
    loudness = number(scaling, "attention_factor", 1e-3, 1e3, default)
    is_cut = flag(scaling, "truncate") if "truncate" in scaling else True  # to whole dimensions

    def dimension(name: str, turns: float) -> float:
        turns = number(scaling, name, 1e-3, 1e6, turns)
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension("beta_fast", 32.0), dimension("beta_slow", 1.0)
    low, high = max(math.floor(low) if is_cut else low, 0), min(math.ceil(high) if is_cut else high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 1e-3), 0.0, 1.0)
    return Rope(inv_freq * (1 - ramp) + inv_freq / factor * ramp, loudness)
