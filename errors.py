"""Everything that can go wrong in words a person can act on; imports nothing of ours.

    StartError                      the service cannot start; one line for the operator
    CommandError                    a command cannot do what it was asked; one line as well
    ServiceError                    an answer to a client: status, code, detail
    ├── InvalidRequestError         422  parameters that contradict each other or the model
    │   └── KeyReusedError               an Idempotency-Key of another request
    ├── ContentRefusedError         400  the prompt holds a forbidden word
    ├── NotFoundError               404
    ├── ConflictError               409  not with a record in this state
    │   ├── CancelledError               the generation was cancelled
    │   └── KeyInUseError           + Retry-After: the key's first request still runs
    ├── UnavailableError            503  + Retry-After
    │   ├── ModelNotReadyError           the model is loading or did not load
    │   ├── OverloadedError              the queue is full
    │   ├── StorageUnavailableError      the database does not take writes
    │   └── InterruptedGenerationError   the process that generated is stopping, or died
    ├── GenerationFailedError       500  the model failed on this request
    └── DeadlineExceededError       504

A detail never carries a path, SQL, driver text, a prompt or a trace.
"""


class StartError(Exception):
    """The service cannot start."""


class CommandError(Exception):
    """A command line's command cannot do what it was asked."""


class ServiceError(Exception):
    status = 500
    code = "internal_error"
    detail = "Something went wrong on our side."
    retry_after: int | None = None  # seconds

    def __init__(self, detail: str | None = None, *, record_id: int | None = None) -> None:
        super().__init__(detail or self.detail)
        self.detail = detail or self.detail
        self.record_id = record_id


class InvalidRequestError(ServiceError):
    status, code = 422, "invalid_request"


class KeyReusedError(InvalidRequestError):
    code = "idempotency_key_reused"
    detail = "This Idempotency-Key was used for another request. Use a new one."


class ContentRefusedError(ServiceError):
    status, code = 400, "content_refused"
    detail = "Prompt contains inappropriate content"


class NotFoundError(ServiceError):
    status, code = 404, "not_found"
    detail = "Record not found"


class ConflictError(ServiceError):
    status, code = 409, "conflict"


class CancelledError(ConflictError):
    code = "cancelled"
    detail = "The generation was cancelled. Its text up to there is kept under the record's id."


class KeyInUseError(ConflictError):
    code = "idempotency_key_in_use"
    detail = "The first request with this Idempotency-Key is still running. Try again shortly."
    retry_after = 1


class UnavailableError(ServiceError):
    status, code = 503, "unavailable"
    retry_after = 1


class ModelNotReadyError(UnavailableError):
    code = "model_not_ready"
    retry_after = 2


class OverloadedError(UnavailableError):
    code = "overloaded"
    detail = "The server is busy: too many generations are waiting. Try again shortly."


class StorageUnavailableError(UnavailableError):
    code = "storage_unavailable"
    detail = "The database does not accept writes at the moment. Try again shortly."
    retry_after = 5


class InterruptedGenerationError(UnavailableError):
    code = "interrupted"
    detail = "The generation was interrupted. Its text up to there is kept under the record's id."


class GenerationFailedError(ServiceError):
    status, code = 500, "generation_failed"
    detail = "The model failed on this prompt. The prompt is kept under the record's id."


class DeadlineExceededError(ServiceError):
    status, code = 504, "deadline_exceeded"
    detail = "The generation did not finish in time and was stopped."
