"""Turns a growing list of token ids into text, piece by piece. Knows no model and no thread.

A token may end in the middle of a character, and a stop string may begin in one token and end in
another; so the text that may be shown lags behind the tokens: it never ends in half a character
and never in what may become a stop string.
"""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what half a character is decoded to, and NUL
CONTEXT = 8  # tokens decoded again before the new ones: a token's text may depend on the last few
LONGEST_CHARACTER = 4  # bytes, and so tokens


class Detokenizer:
    """``decode`` takes ids to text. Feed tokens with ``push``; ``finish`` when there are no more.

    ``text`` is decode(prompt + output) less decode(prompt), as far as it is made of whole
    characters, and cut before the first stop string, at which ``stopped`` becomes true.
    ``shown`` is its part that no later token can take back. Where a tokenizer falls back to bytes,
    one that fits nowhere spoils all its neighbours when they are decoded together; here it spoils
    none that came before it, however the tokens were pushed.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self.decode = decode
        self.stop = [string for string in stop if string]
        self.window, self.known = tail(decode, list(prompt_ids))
        self.read = len(self.window)  # how many of the window's ids are in the text
        self.text = ""
        self.pushed = 0
        self.stopped = False
        self.finished = False

    def push(self, ids: Sequence[int]) -> None:
        """More output tokens. What follows a stop string is ignored."""
        self.pushed += len(ids)
        if self.stopped or not ids:
            return
        decoded = self.decode([*self.window, *ids])
        if UNFINISHED not in decoded:
            self.window += ids
            self._take(decoded)
            return
        for token in ids:
            self._push_one(token)

    def finish(self) -> None:
        """No more tokens: an unfinished character stays one."""
        if self.finished:
            return
        self.finished = True
        if not self.stopped and self.read < len(self.window):
            self._take(self.decode(self.window))

    @property
    def shown(self) -> str:
        if self.stopped or self.finished:
            return self.text
        return self.text[: len(self.text) - self._could_be_stop()]

    def _push_one(self, token: int) -> None:
        self.window.append(token)
        decoded = self.decode(self.window)
        if not self.stopped and not decoded.endswith(UNFINISHED):
            self._take(decoded)

    def _take(self, decoded: str) -> None:
        before = len(self.text)
        self.text += self._new(decoded)
        self.window, self.known = tail(self.decode, self.window)
        self.read = len(self.window)
        self._cut(before)

    def _new(self, decoded: str) -> str:
        if decoded.startswith(self.known) or self.known.endswith(UNFINISHED):
            return decoded[len(self.known) :]
        return self.decode(self.window[self.read :])  # the others were spoilt

    def _cut(self, before: int) -> None:
        longest = max(map(len, self.stop), default=0)
        start = max(0, before - longest + 1)
        found = [at for string in self.stop if (at := self.text.find(string, start)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _could_be_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            end = self.text[-length:]
            if any(string.startswith(end) for string in self.stop):
                return length
        return 0


def tail(decode: Callable[[list[int]], str], ids: list[int]) -> tuple[list[int], str]:
    """The last few ids and their text, which begins with a whole character if one can be found:
    where bytes are tokens, half a character would spoil those after it."""
    for size in range(CONTEXT, CONTEXT + LONGEST_CHARACTER):
        text = decode(ids[-size:])
        if not text.startswith(UNFINISHED):
            break
    return ids[-size:], text
