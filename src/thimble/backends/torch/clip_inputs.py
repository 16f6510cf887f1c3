"""What a model of sound takes: features made by its own extractor, in a window as short as the clip lets it be.

Whisper hears 30 seconds, whatever a clip has, and most of the work is for silence. Here a clip is filled up to whole
seconds alone, so that its features depend on no other clip, and clips of like length share a batch.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from thimble.errors import BaseModelError, MissingPackageError, escaped, install_line

STEP_SECONDS = 1  # windows are multiples of it
FRAMES = 100  # in a second: what a clip costs is counted in them
_USUAL_SECONDS = 30.0


class ClipInputs:
    """The features of clips, as the extractor in the folder of a base makes them.

    It takes `rate` samples a second; `most_seconds` is the longest window that it has.
    """

    def __init__(self, folder: Path, name: str, has_own_window: bool = False) -> None:
        """Open the extractor of a base; raises BaseModelError if the folder has none for sound.

        Args:
            folder: Of the base.
            name: What it is called in messages.
            has_own_window: Whether clips are heard as the extractor itself cuts them, for an adapter that was trained
                so: in Whisper's 30 seconds, or as long as they are.

        Raises:
            BaseModelError: If the folder has none for sound.
        """
        try:
            from transformers import AutoFeatureExtractor
        except ImportError:
            raise MissingPackageError(
                f"sound is prepared by transformers, which is not installed: run {install_line('models')}"
            ) from None
        try:
            self._extractor: Any = AutoFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            told = escaped(" ".join(str(error).split())[:150])
            raise BaseModelError(
                f"base {name} does not say how sound is made ready for it ({told}): expected preprocessor_config.json "
                "beside its config.json, as its authors have it"
            ) from None
        self.rate: int = getattr(self._extractor, "sampling_rate", 0)
        if not self.rate:
            raise BaseModelError(f"base {name} is none for sound: its preprocessor_config.json names no sampling_rate")
        own = getattr(self._extractor, "chunk_length", None) or getattr(self._extractor, "max_length", 0) / FRAMES
        self.most_seconds = float(own or _USUAL_SECONDS)
        names = self._extractor.model_input_names
        self._step = STEP_SECONDS * FRAMES  # windows are multiples of so many hundredths of a second
        if has_own_window:
            has_fixed = hasattr(self._extractor, "chunk_length")
            self._step = round(self.most_seconds * FRAMES) if has_fixed else 1
        self._takes_frames = "input_values" not in names and not hasattr(self._extractor, "chunk_length")

    def frames(self, seconds: float) -> int:
        """The window of a clip, in hundredths of a second: by default whole seconds, at least one."""
        heard = min(seconds, self.most_seconds) * FRAMES
        return max(1, math.ceil(heard / self._step - 1e-6)) * self._step

    def features(self, samples: NDArray[np.float32], frames: int = 0) -> dict[str, NDArray[Any]]:
        """What the model takes of a clip, by name, without the axis of rows.

        Args:
            samples: float32 (samples,), at `rate`; what is longer than `most_seconds` is cut off.
            frames: Of the window, where that is known already.

        Returns:
            Such as `input_features` float32 (bands, frames), or `input_values` float32 (samples,) and a mask.
        """
        length = (frames or self.frames(len(samples) / self.rate)) * self.rate // FRAMES
        options: dict[str, Any] = {"padding": "max_length", "max_length": length, "truncation": True}
        if self._takes_frames:  # its lengths are counted in frames, so samples are filled up before
            samples, options = np.pad(samples[:length], (0, max(0, length - len(samples)))), {}
        made = self._extractor(samples, sampling_rate=self.rate, return_tensors="np", **options)
        return {name: array[0] for name, array in made.items()}


def allow_short_windows(module: nn.Module) -> None:
    """Have encoders of Whisper take windows shorter than their own: the positions of the first frames are added.

    transformers compares the length of what comes in with the number of positions; both are set for each call, and the
    module is as it was behind it.
    """
    for encoder in module.modules():
        if isinstance(getattr(encoder, "embed_positions", None), nn.Embedding) and hasattr(encoder, "conv2"):
            encoder.register_forward_pre_hook(_fit, with_kwargs=True)
            encoder.register_forward_hook(_as_it_was, always_call=True)


def _fit(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    frames = (args[0] if args else kwargs["input_features"]).shape[-1]
    positions = -(-frames // (encoder.conv1.stride[0] * encoder.conv2.stride[0]))
    if positions <= len(encoder.embed_positions.weight):
        _set_positions(encoder, positions)


def _as_it_was(encoder: Any, args: Any, output: Any) -> None:
    _set_positions(encoder, len(encoder.embed_positions.weight))


def _set_positions(encoder: Any, positions: int) -> None:
    encoder.embed_positions.num_embeddings = encoder.config.max_source_positions = positions
