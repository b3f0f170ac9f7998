"""Queries on ``secrets``."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from models import Secret


def get(session: Session, name: str) -> str:
    return session.scalars(select(Secret.value).where(Secret.name == name)).one()
