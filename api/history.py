"""History beyond the headline route: lists, a user's latest, deletion."""

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Path, Query, Request, Response

from api.dependencies import DbSession, Generation, Owner
from api.errors import responses
from models import GenerationRecord, HistoryQuery, Page, Record, UserId
from services import history, replay

router = APIRouter(tags=["history"])

RecordId = Annotated[int, Path(ge=1, le=2**63 - 1)]


@router.get("/history", response_model=list[Record], responses=responses(400, 503))
def list_history(
    request: Request,
    response: Response,
    session: DbSession,
    owner: Owner,
    query: Annotated[HistoryQuery, Query()],
) -> list[GenerationRecord]:
    """Records, newest first. A `Link` header leads to the next page while there is one."""
    found, more = history.page(session, owner, query)
    if more:
        link_next_page(request, response, found[-1].id)
    return found


@router.get("/users/{user_id}/history", response_model=list[Record], responses=responses(400, 503))
def list_user_history(
    request: Request,
    response: Response,
    session: DbSession,
    owner: Owner,
    user_id: UserId,
    page: Annotated[Page, Query()],
) -> list[GenerationRecord]:
    """A user's records, most recent first; the last ten unless `limit` says otherwise."""
    query = HistoryQuery(user_id=user_id, limit=page.limit, after=page.after)
    found, more = history.page(session, owner, query)
    if more:
        link_next_page(request, response, found[-1].id)
    return found


@router.delete("/history/{record_id}", status_code=204, responses=responses(404, 503))
def delete_record(record_id: RecordId, session: DbSession, owner: Owner) -> None:
    """Delete one record for good."""
    history.delete(session, owner, record_id)


@router.post("/history/{record_id}/replay", responses=responses(404, 409, 503))
def replay_record(
    record_id: RecordId, session: DbSession, owner: Owner, service: Generation
) -> replay.Replay:
    """Run a record again: `identical`, `different` from which token on, or `model_changed`."""
    return replay.replay(session, owner, record_id, service.models, service.timeout)


def link_next_page(request: Request, response: Response, last_id: int) -> None:
    query = dict(request.query_params) | {"after": str(last_id)}
    response.headers["Link"] = f'<{request.url.path}?{urlencode(query)}>; rel="next"'
