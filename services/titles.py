"""Titles that the model suggests, in the background.

That a conversation waits for a title is in its row, so a crash loses none; the title is set only
while it still waits, so none is set twice, and one set by hand stays.
"""

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from database import Database, transaction
from engine.errors import EngineFullError, EngineStoppedError, GenerationError
from engine.sampling import SamplingParams
from errors import ModelNotReadyError
from log import event
from repositories import conversations
from services.conversations import first_words
from services.model_host import ModelHost

if TYPE_CHECKING:
    from engine.loading import LoadedModel

log = logging.getLogger(__name__)

TITLE_SECONDS = 1.0
TITLES_AT_ONCE = 4
TITLE_TOKENS = 12
PROMPT_CHARACTERS = 500  # of the prompt, to make a title of
STOP = ("\n", '"', ".", ",", ";", "!", "?")
TITLE_TIMEOUT_SECONDS = 60.0


class Titler:
    def __init__(self, database: Database, models: ModelHost) -> None:
        self.database = database
        self.models = models

    def tick(self) -> None:
        """Title what waits, when the model is there."""
        if self.models.unready() is not None:
            return
        with self.database.sessions() as session:
            waiting = [
                (conversation, conversations.beginning(session, conversation))
                for conversation in conversations.untitled(session, TITLES_AT_ONCE)
            ]
        for conversation, beginning in waiting:
            title = self.suggest(beginning) or conversation.title
            with self.database.sessions() as session, transaction(session):
                set_now = conversations.suggest_title(
                    session, conversation.id, title, datetime.now(UTC)
                )
            if set_now:
                event(log, logging.INFO, "conversation titled", id=conversation.id)

    def suggest(self, beginning: str) -> str:
        """The model's title, or the first words where it has none to offer: none of nothing."""
        fallback = first_words(beginning)
        if not fallback:
            return fallback
        try:
            model, engine = self.models.running()
            lead, ids = question(model, beginning)
            params = SamplingParams(TITLE_TOKENS, seed=0, temperature=0.0, stop=STOP)
            with engine.admit(ids, params) as generation:
                generation.start()
                text = generation.result(TITLE_TIMEOUT_SECONDS).text
        except (ModelNotReadyError, EngineFullError, EngineStoppedError, GenerationError):
            return fallback
        except (TimeoutError, ValueError):  # the latter: no question that the model can run
            return fallback
        suggested = text.strip(" '")
        return first_words(f"{lead}{suggested}") if suggested else fallback


def question(model: "LoadedModel", prompt: str) -> tuple[str, list[int]]:
    """What a title begins with, and the tokens that ask for the rest of it.

    Of the prompt it has as much as leaves room for the title: a character can be several tokens.
    """
    words = prompt[:PROMPT_CHARACTERS]
    lead, ids = question_of(model, words)
    while words and len(ids) + TITLE_TOKENS > model.context_size:
        words = words[: len(words) // 2]
        lead, ids = question_of(model, words)
    return lead, ids


def question_of(model: "LoadedModel", words: str) -> tuple[str, list[int]]:
    """A model made for chat is asked; one that only continues texts gets a text to continue."""
    if model.tokenizer.chat_template:
        asked = f"Suggest a title of at most six words for a conversation that begins so:\n{words}"
        return "", model.encode_thread([], asked)[0]
    return "The ", model.encode(f'{words}\n\nThis is called "The')
