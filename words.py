"""What counts as a word in a search, and what a search asks for. Imports nothing of ours.

Every database indexes the words made here and is asked for words made here, so that a search means
the same on each of them:

* Letters are folded: compatibility forms, case and accents do not count ("Ünï" is "uni").
* A character of a script that puts no spaces between words, and a symbol such as an emoji, is a
  word of its own; what is typed together is then found as a phrase.
* Everything else separates words.

A mark is a word that no text can hold: it says whose record it is, so that filters are part of
the search.
"""

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

LONGEST_WORD = 64  # characters; of longer ones the first so many count
MOST_WORDS = 16_000  # of one text: PostgreSQL numbers positions up to 16,383
MOST_BYTES = 600_000  # of one text's words: PostgreSQL takes 1 MiB
MOST_ASKED = 32  # words in one search
SHORTEST_PREFIX = 2
SNIPPET_LENGTH = 160
SNIPPET_LEAD = 40  # characters before the first match
WINDOW = 8192  # characters of a long text that are looked through at once

# Scripts that put no spaces between words; Korean puts them between groups of words.
ALONE = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),  # Hangul
    (0x20000, 0x3FFFF),
)
VOICING = "\uff9e\uff9f"  # of half-width kana
QUOTES = str.maketrans("\u201c\u201d\u201e\uff02", '""""')
TERM = re.compile(r'(-?)(?:"([^"]*)"|([^\s"]+))')


class NonsenseError(ValueError):
    """A search that asks for nothing; the message says why."""


class Folding(dict[int, str]):
    """Each character's part of a word; a space ends the word before it."""

    def __missing__(self, code: int) -> str:
        folded = self[code] = fold(chr(code))
        return folded


def fold(character: str) -> str:
    decomposed = unicodedata.normalize("NFKD", character).casefold()
    decomposed = unicodedata.normalize("NFKD", decomposed)
    kept = "".join(c for c in decomposed if not is_accent(c))
    return "".join(part_of_word(c) for c in unicodedata.normalize("NFC", kept))


def is_accent(character: str) -> bool:
    """Accents, Hebrew points and Arabic vowel signs, by canonical combining class."""
    place = unicodedata.combining(character)
    return 10 <= place <= 36 or place >= 200


def part_of_word(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Cf", "Me") or "\ufe00" <= character <= "\ufe0f":  # they show nothing alone
        return ""
    if category == "So" or (category[0] in "LMN" and stands_alone(character)):
        return f" {character} "
    return character if category[0] in "LMN" else " "


def stands_alone(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in ALONE)


FOLDING = Folding()


def words(text: str) -> list[str]:
    """The words of a text, in order; of a very long text the first ``MOST_WORDS``."""
    folded = unicodedata.normalize("NFKC", text).translate(FOLDING)
    found = folded.split()
    if max(map(len, found), default=0) > LONGEST_WORD:  # to look costs less than to cut each
        found = [word[:LONGEST_WORD] for word in found]
    if len(folded) > MOST_WORDS:  # of fewer characters are neither too many words nor bytes
        del found[MOST_WORDS:]
        while sum(len(word.encode()) for word in found) > MOST_BYTES:
            del found[len(found) // 2 :]
    return found


@lru_cache(maxsize=1 << 14)
def mark(kind: str, value: object) -> str:
    """A word that stands for a value; others may share it, so the value itself decides."""
    return f"_{kind}{blake2b(str(value).encode(), digest_size=4).hexdigest()}"


MESSAGE_MARK = "_message"  # a record in whatever conversation


def record_marks(
    owner_id: str,
    user_id: str | None = None,
    status: str | None = None,
    model_name: str | None = None,
    conversation_id: int | None = None,
) -> list[str]:
    """The marks of a record that has these values, or of a search for records that have them."""
    values = {"o": owner_id, "u": user_id, "s": status, "m": model_name, "c": conversation_id}
    marks = [mark(kind, value) for kind, value in values.items() if value is not None]
    return marks if conversation_id is None else [*marks, MESSAGE_MARK]


def record_text(prompt: str, completion: str, conversation_id: int | None) -> str:
    """A continuation goes on in the middle of its prompt's word; an answer does not."""
    return prompt + completion if conversation_id is None else f"{prompt}\n{completion}"


def record_words(
    prompt: str,
    completion: str,
    owner_id: str,
    user_id: str | None,
    status: str,
    model_name: str,
    conversation_id: int | None,
) -> str:
    """What the search index holds of a record: its words, then its marks."""
    marks = record_marks(owner_id, user_id, status, model_name, conversation_id)
    return " ".join(words(record_text(prompt, completion, conversation_id)) + marks)


def title_words(title: str, owner_id: str) -> str:
    """What the search index holds of a conversation."""
    return " ".join([*words(title), mark("o", owner_id)])


@dataclass(frozen=True)
class Term:
    """Words that stand side by side; with ``prefix`` the last one may go on."""

    words: tuple[str, ...]
    prefix: bool = False
    excluded: bool = False

    def matches(self, found: Sequence[str]) -> bool:
        """Whether as many words as it has are these."""
        if self.prefix and found[-1].startswith(self.words[-1]):
            return tuple(found[:-1]) == self.words[:-1]
        return tuple(found) == self.words

    def may_be_in(self, found: AbstractSet[str]) -> bool:
        """Whether a text with these words may have it."""
        *first, last = self.words
        going_on = self.prefix and any(word.startswith(last) for word in found)
        return found >= set(first) and (going_on or last in found)

    def count(self, found: Sequence[str]) -> int:
        """How often it is in a text's words."""
        size = len(self.words)
        return sum(
            self.matches(found[place : place + size]) for place in range(len(found) - size + 1)
        )


def parse_search(text: str) -> list[Term]:
    """What a search asks for: word, "exact phrase", prefix*, -without. Raises NonsenseError."""
    text = text.translate(QUOTES)
    if text.count('"') % 2:
        raise NonsenseError("A quotation mark has no partner")
    terms = [
        term
        for minus, phrase, word in TERM.findall(text)
        if (term := parse_term(word or phrase, bool(minus), bool(word))) is not None
    ]
    if all(term.excluded for term in terms):
        raise NonsenseError("A search needs a word to look for")
    if sum(len(term.words) for term in terms) > MOST_ASKED:
        raise NonsenseError(f"A search takes at most {MOST_ASKED} words")
    return terms


def parse_term(text: str, excluded: bool, may_go_on: bool) -> Term | None:
    """None for mere punctuation."""
    found = tuple(words(text))
    if not found:
        return None
    alone = FOLDING[ord(found[-1][0])].startswith(" ")  # a word that ends with its character
    prefix = may_go_on and text.endswith("*") and not alone
    if prefix and len("".join(found)) < SHORTEST_PREFIX:
        raise NonsenseError(f"A beginning of a word needs {SHORTEST_PREFIX} characters before *")
    return Term(found, prefix, excluded)


def located(text: str, place: int = 0) -> Iterator[tuple[str, int, int]]:
    """The words of a text from a place on, with where they begin and end."""
    word, start, end = "", 0, 0
    while place < len(text):
        after = whole(text, place + 1)
        for part in folded(text[place:after]):
            if part != " ":
                start = start if word else place
                word, end = word + part, after
            elif word:
                yield word[:LONGEST_WORD], start, end
                word = ""
        place = after
    if word:
        yield word[:LONGEST_WORD], start, end


def folded(character: str) -> str:
    """With what belongs to it, if anything: half-width kana become one with their voicing."""
    if len(character) == 1:
        return FOLDING[ord(character)]
    return unicodedata.normalize("NFKC", character).translate(FOLDING)


def whole(text: str, place: int) -> int:
    """The next place that is not between a character and its accents, or its voicing."""
    while place < len(text) and (not FOLDING[ord(text[place])] or text[place] in VOICING):
        place += 1
    return place


def snippet(text: str, terms: Sequence[Term]) -> str:
    """The text around the first match, as HTML: escaped, matches inside ``<mark>``."""
    text = unicodedata.normalize("NFC", text)
    wanted = [term for term in terms if not term.excluded]
    matches = first_matches(text, wanted)
    start = max(0, matches[0][0] - SNIPPET_LEAD) if matches else 0
    if start:
        start = whole(text, text.find(" ", start, matches[0][0]) + 1 or start)
    end = max(start + SNIPPET_LENGTH, matches[0][1] if matches else 0)
    if end < len(text):
        end = max(text.rfind(" ", start, end), matches[0][1] if matches else 0, start) or end
        end = whole(text, end)
    shown = "…" if start else ""
    for first, last in matches:
        if first >= start and last <= end:
            shown += f"{html.escape(text[start:first])}<mark>{html.escape(text[first:last])}</mark>"
            start = last
    return shown + html.escape(text[start:end]) + ("…" if end < len(text) else "")


def first_matches(text: str, terms: Sequence[Term]) -> list[tuple[int, int]]:
    """Where the first match begins and ends, and those near behind it; none overlaps another."""
    seen: list[tuple[str, int, int]] = []
    matches: list[tuple[int, int]] = []
    for found in located(text, place_near(text, terms)):
        if matches and found[1] > matches[0][0] + SNIPPET_LENGTH:
            break
        seen.append(found)
        for term in terms:
            last = seen[-len(term.words) :]
            if len(last) == len(term.words) and term.matches([word for word, _, _ in last]):
                start = max(last[0][1], matches[-1][1] if matches else 0)
                if start < found[2]:
                    matches.append((start, found[2]))
    return matches


def place_near(text: str, terms: Sequence[Term]) -> int:
    """A place before the first match, found without a look at each character of a long text."""
    for place in range(0, len(text) if len(text) > WINDOW else 0, WINDOW // 2):
        found = set(words(text[place : place + WINDOW]))
        if any(term.may_be_in(found) for term in terms):
            return max(0, text.rfind(" ", 0, place))  # not within a word
    return 0


def is_match(text: str, terms: Sequence[Term]) -> bool:
    """Whether a text has all that is asked for, and nothing that is not to be there."""
    found = words(text)
    return all((term.count(found) > 0) is not term.excluded for term in terms)
