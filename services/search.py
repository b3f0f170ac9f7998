"""What a search shows: matches in the order of how well they match, and the text around them."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from errors import InvalidRequestError
from models import Conversation, GenerationRecord, HistoryItem, HistoryQuery, Record
from repositories import conversations, lists
from words import Term, is_match, parse_search, record_text, snippet, words

MOST_RANKED = 1000
SATURATION = 1.2  # BM25's k1 and b, and a length that stands for the average's
LENGTH_WEIGHT = 0.75
USUAL_LENGTH = 100  # words


def ranked_page(
    session: Session, owner_id: str, query: HistoryQuery
) -> tuple[list[HistoryItem], bool]:
    """The best of the newest matches, and whether more follow. Raises InvalidRequestError."""
    everything = query.model_copy(update={"after": None, "limit": MOST_RANKED})
    found, _ = lists.page(session, owner_id, everything)
    terms = wanted(query)
    ranks = {record.id: (-score(text_of(record), terms), -record.id) for record in found}
    if query.after is not None:
        last = ranks.get(query.after)
        if query.after_score is not None:  # the record itself may be gone by now
            last = -query.after_score, -query.after
        if last is None:
            raise InvalidRequestError("The record in `after` is no longer among the best matches.")
        found = [record for record in found if ranks[record.id] > last]
    found.sort(key=lambda record: ranks[record.id])
    return found[: query.limit], len(found) > query.limit


def wanted(query: HistoryQuery) -> list[Term]:
    return [term for term in parse_search(query.q or "") if not term.excluded]


def record_score(record: Record, query: HistoryQuery) -> float:
    return score(text_of(record), wanted(query))


def score(text: str, terms: Sequence[Term]) -> float:
    """BM25 without the rareness of words: alike for whoever asks, whatever else is stored."""
    found = words(text)
    size = SATURATION * (1 - LENGTH_WEIGHT + LENGTH_WEIGHT * len(found) / USUAL_LENGTH)
    return sum(count / (count + size) for term in terms if (count := term.count(found)))


def text_of(record: Record | GenerationRecord) -> str:
    completion = record.generated_text.removeprefix(record.prompt)
    return record_text(record.prompt, completion, record.conversation_id)


def record_snippet(record: Record, q: str) -> str:
    return snippet(text_of(record), parse_search(q))


def conversation_snippet(
    session: Session, owner_id: str, conversation: Conversation, q: str
) -> str | None:
    """Of the title, or of the newest message that matches."""
    terms = parse_search(q)
    if is_match(conversation.title, terms):
        return snippet(conversation.title, terms)
    message = conversations.newest_match(session, owner_id, conversation.id, terms)
    return None if message is None else snippet(text_of(message), terms)
