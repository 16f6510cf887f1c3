"""Tokens to text while they come, without decoding what is already out."""

from thimble.data.tokenizer import Tokenizer


class TextStream:
    """The text of one answer, piece by piece.

    A token means something only beside the one before it (a space, half a character), so each piece is what a short
    window of tokens gains by the new ones.

    Args:
        tokenizer: Of the base.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = self._shown = 0  # where the window begins, and where what is not out yet does

    def add(self, token: int) -> str:
        """The text that a token adds; empty in the middle of a character."""
        self._ids.append(token)
        text = self._decode(len(self._ids))
        return "" if text.endswith("\ufffd") else self._piece(text)

    def end(self) -> str:
        """What is left when the answer ends, in the middle of a character too."""
        return self._piece(self._decode(len(self._ids)))

    def _piece(self, text: str) -> str:
        before = self._decode(self._shown)
        self._window, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._window : end], skip_special=True)
