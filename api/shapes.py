"""How an object becomes an answer, on the thread that read it.

FastAPI would validate once more what a route returns: for a read of one row that costs about as
much as the read.
"""

from fastapi import Response
from pydantic import BaseModel


def shaped(found: BaseModel) -> Response:
    """The JSON of what a route's ``response_model`` describes."""
    return Response(found.model_dump_json(), media_type="application/json")
