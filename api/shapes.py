"""How an object becomes an answer, in the thread that read it.

FastAPI would hand what a route returns to another thread to validate it: for a read of one row
that costs about as much as the read.
"""

from fastapi import Response
from pydantic import BaseModel


def shaped(schema: type[BaseModel], found: object) -> Response:
    """The JSON of an object as a route's ``response_model`` has it."""
    body = schema.model_validate(found).model_dump_json()
    return Response(body, media_type="application/json")
