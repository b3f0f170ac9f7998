"""Whether this process can do its work, and if not, why."""

from typing import Any

from sqlalchemy.exc import DBAPIError

from errors import StorageUnavailableError
from services.leases import LeaseKeeper
from services.model_host import ModelHost


def report(lease: LeaseKeeper, models: ModelHost) -> dict[str, Any]:
    """``status`` is ready or not_ready; each part says ``ok`` or its reason."""
    parts = {"database": database_reason(lease), "model": models.unready()}
    ready = all(reason is None for reason in parts.values())
    answer: dict[str, Any] = {"status": "ready" if ready else "not_ready"}
    answer |= {part: reason or "ok" for part, reason in parts.items()}
    if models.model is not None:
        answer["model_name"] = models.model.name
        answer["dtype"] = models.model.dtype
        answer["device"] = models.model.device
        if models.engine is not None:
            answer["running"] = models.engine.running
            answer["waiting"] = models.engine.waiting
        if models.model.substitute:
            answer["warning"] = (
                "gpt2 could not be had: this is the small bundled model. Set MODEL to choose one."
            )
    return answer


def database_reason(lease: LeaseKeeper) -> str | None:
    """None after a real write."""
    if lease.database.damaged:
        return "it is damaged: restore a backup"
    try:
        lease.beat()
    except (StorageUnavailableError, DBAPIError):
        return "it does not accept writes"
    return None
