"""Whole-word filter for prompts, blind to letter case, width and invisible characters."""

import logging
import re
import unicodedata
from collections.abc import Iterable

import metrics
from errors import ContentRefusedError
from log import event

log = logging.getLogger(__name__)


def normalise(text: str) -> str:
    """Compatibility forms folded (NFKC), format characters such as zero-width spaces dropped."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    visible = "".join(c for c in folded if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFKC", visible)


def whole_words(words: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for any of the words or phrases; an underscore ends a word as a space does."""
    phrases = [
        r"[\W_]+".join(re.escape(part) for part in normalise(word).split()) for word in words
    ]
    phrases = [phrase for phrase in phrases if phrase]
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(phrases)})(?![^\W_])") if phrases else None


class ContentFilter:
    def __init__(self, words: Iterable[str]) -> None:
        self.pattern = whole_words(words)

    def check(self, prompt: str) -> None:
        """Raises ContentRefusedError."""
        if self.pattern is not None and self.pattern.search(normalise(prompt)):
            metrics.REFUSED.inc()
            event(log, logging.INFO, "prompt refused", characters=len(prompt))
            raise ContentRefusedError
