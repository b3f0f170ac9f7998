"""Is it alive, is it ready, how much has it done. Monitors ask with HEAD as well as GET."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services import readiness

router = APIRouter(tags=["operations"])


@router.head("/health/live", include_in_schema=False)
@router.get(
    "/health/live", responses={503: {"description": "The model hangs", "model": dict[str, str]}}
)
async def live(request: Request, response: Response) -> dict[str, str]:
    """The process answers. On the event loop: it needs no free thread."""
    state = request.app.state
    if state.models.hangs(state.settings.watchdog_seconds):
        response.status_code = 503
        return {"status": "the model hangs"}
    return {"status": "alive"}


@router.head("/health/ready", include_in_schema=False)
@router.get(
    "/health/ready",
    responses={503: {"description": "Not ready, with the reasons", "model": dict[str, Any]}},
)
def ready(request: Request, response: Response) -> dict[str, Any]:
    """The database takes writes and the model is loaded."""
    state = request.app.state
    report = readiness.report(state.lease, state.models)
    if report["status"] != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    return report


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=PlainTextResponse)
async def prometheus_metrics() -> Response:
    """Counters in Prometheus' text format."""
    return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
