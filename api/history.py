"""History beyond the headline route: lists, a user's latest, deletion."""

from typing import Annotated
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Path, Query, Request, Response

from api.dependencies import DbSession, Generation, OnceKey, Owner, tell_replayed
from api.errors import responses
from models import (
    Analysis,
    AnalyzeRequest,
    GenerationRecord,
    HistoryItem,
    HistoryQuery,
    Page,
    Record,
    Statistics,
    StatisticsQuery,
    UserId,
)
from services import erasure, history, replay, search, statistics

router = APIRouter(tags=["history"])

RecordId = Annotated[int, Path(ge=1, le=2**63 - 1)]


@router.get("/history", response_model=list[HistoryItem], responses=responses(400, 503))
def list_history(
    request: Request,
    response: Response,
    session: DbSession,
    owner: Owner,
    query: Annotated[HistoryQuery, Query()],
) -> list[HistoryItem]:
    """Records, newest first; with `q`, those that hold its words. A `Link` header leads to the
    next page while there is one."""
    found, more = history.page(session, owner, query)
    if more and query.order == "rank":
        score = search.record_score(found[-1], query)
        link_next_page(request, response, found[-1].id, after_score=str(score))
    elif more:
        link_next_page(request, response, found[-1].id)
    if query.q is not None:
        for record in found:
            record.snippet = search.record_snippet(record, query.q)
    return found


@router.get(
    "/users/{user_id:path}/history", response_model=list[Record], responses=responses(400, 503)
)
def list_user_history(
    request: Request,
    response: Response,
    session: DbSession,
    owner: Owner,
    user_id: UserId,
    page: Annotated[Page, Query()],
) -> list[HistoryItem]:
    """A user's records, most recent first; the last ten unless `limit` says otherwise."""
    query = HistoryQuery(user_id=user_id, limit=page.limit, after=page.after)
    found, more = history.page(session, owner, query)
    if more:
        link_next_page(request, response, found[-1].id)
    return found


@router.post(
    "/analyze/{user_id:path}",
    response_model=Analysis,
    responses=responses(400, 409, 413, 500, 503, 504),
)
def analyze(
    user_id: UserId,
    request: AnalyzeRequest,
    response: Response,
    session: DbSession,
    owner: Owner,
    service: Generation,
    key: OnceKey,
) -> GenerationRecord:
    """Continue a user's text; the same text is answered from the store for a while."""
    answer = service.analyze(session, owner, user_id, request, key)
    tell_replayed(response, answer)
    return answer.record


@router.get("/stats", responses=responses(503))
def get_statistics(
    session: DbSession, owner: Owner, query: Annotated[StatisticsQuery, Query()]
) -> list[Statistics]:
    """Requests, tokens, failures and latencies, by the hour, by the day or in all; newest first,
    then the busiest. Deleting a record changes nothing here: it did happen."""
    return statistics.statistics(session, owner, query)


@router.delete("/history/{record_id}", status_code=204, responses=responses(404, 503))
def delete_record(
    record_id: RecordId, session: DbSession, owner: Owner, service: Generation
) -> None:
    """Delete one record for good."""
    history.delete(session, owner, record_id, service.live.all())


@router.delete("/users/{user_id:path}", responses=responses(400, 503))
def erase_user(user_id: UserId, owner: Owner, service: Generation) -> erasure.Erased:
    """Delete every record of a user, pinned or running ones too, and the conversations that were
    theirs alone. `cleared`: nothing of it is left in a SQLite file, its log or its index.
    """
    return erasure.erase(
        service.database,
        owner,
        user_id,
        service.live.all(),
        service.cache.forget,
        erasure.QUICK_BYTES,
    )


@router.post("/history/{record_id}/pin", response_model=Record, responses=responses(404, 503))
def pin_record(record_id: RecordId, session: DbSession, owner: Owner) -> GenerationRecord:
    """Keep a record, and its text, however old it is."""
    return history.pin(session, owner, record_id, True)


@router.delete("/history/{record_id}/pin", status_code=204, responses=responses(404, 503))
def unpin_record(record_id: RecordId, session: DbSession, owner: Owner) -> None:
    """Let it go when its time has come."""
    history.pin(session, owner, record_id, False)


@router.post("/history/{record_id}/replay", responses=responses(404, 409, 500, 503, 504))
def replay_record(
    record_id: RecordId, session: DbSession, owner: Owner, service: Generation
) -> replay.Replay:
    """Run a record again: `identical`, `different` from which token on, or `model_changed`."""
    return replay.replay(session, owner, record_id, service.models, service.timeout)


def link_next_page(request: Request, response: Response, last_id: int, **also: str) -> None:
    """A `Link` to what follows ``last_id``. What `skip` left out lies before it: not again."""
    query = dict(request.query_params) | {"after": str(last_id)} | also
    query.pop("skip", None)
    path = quote(request.scope["path"], safe="/")  # a header takes Latin-1, a link no spaces
    response.headers["Link"] = f'<{path}?{urlencode(query)}>; rel="next"'
