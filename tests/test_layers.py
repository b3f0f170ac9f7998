"""Imports point down only: who may import what, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

from tests.service import ROOT

LEAVES = {"column_types", "words", "models", "errors", "log", "metrics", "lookup"}
STORE = {"database", "connections", "sqlite_file", "reader", "async_postgres"}
APPS = {"main", "manage"}
OURS = LEAVES | STORE | APPS | {"settings", "api", "services", "repositories", "engine"}
EXEMPT = {"tests", "scripts", "benchmarks", "conftest.py", "test_main.py"}
WEB = {"fastapi", "starlette"}
FRAMEWORKS = {"torch", "transformers"}
API_MAY = {
    "database": {"database.get_db", "database.kind"},
    "reader": {"reader.Reader"},
    "sqlalchemy": {"sqlalchemy.orm.Session", "sqlalchemy.exc"},
}
SQL_IN_API = {"api/dependencies.py", "api/errors.py"}


def imported(source: str) -> Iterator[str]:
    """Every imported name, dotted and absolute: ``from a import b`` is ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def may_import(path: str, name: str) -> bool:
    layer, top = PurePath(path).parts[0].removesuffix(".py"), name.split(".")[0]
    if top in {""} | APPS:  # a relative import would hide where it points
        return False
    if top in FRAMEWORKS and layer != "engine":
        return False
    ours = top in OURS and top != layer
    if layer == "models" and top in {"column_types", "words"}:
        return True
    if layer in LEAVES:
        return not ours
    if layer == "settings":
        return not ours or top == "errors"
    if layer in STORE:
        return not ours or top in {"errors", "log", "words", "lookup"} | STORE
    if layer == "repositories":
        return not ours or top in {"models", "errors", "words", "lookup"}
    if layer == "engine":
        return not ours and top not in WEB | {"sqlalchemy", "pydantic_settings"}
    if layer == "services":
        return top not in WEB | {"api"}
    if layer == "manage":
        return top not in WEB | {"api", "repositories", "engine", "sqlalchemy"}
    if layer == "api":
        if top == "sqlalchemy" and path not in SQL_IN_API:
            return False
        if allowed := API_MAY.get(top):
            return any(name == one or name.startswith(one + ".") for one in allowed)
        return top not in {"repositories", "engine"} | STORE
    return True


def forbidden(path: str, source: str) -> list[str]:
    return [name for name in imported(source) if not may_import(path, name)]


def modules() -> list[str]:
    paths = [*ROOT.glob("*.py")] + [path for path in ROOT.glob("*/**/*.py") if is_ours(path)]
    found = [str(path.relative_to(ROOT)) for path in paths]
    return sorted(path for path in found if PurePath(path).parts[0] not in EXEMPT)


def is_ours(path: Path) -> bool:
    return (ROOT / path.relative_to(ROOT).parts[0] / "__init__.py").is_file()


def test_every_module_imports_downwards_only() -> None:
    wrong = {path: forbidden(path, Path(ROOT / path).read_text()) for path in modules()}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_every_module_belongs_to_a_layer() -> None:
    layers = {PurePath(path).parts[0].removesuffix(".py") for path in modules()}
    assert layers == OURS


@pytest.mark.parametrize(
    ("path", "line", "name"),
    [
        ("models.py", "from errors import StartError", "errors.StartError"),
        ("words.py", "from models import Status", "models.Status"),
        ("errors.py", "import log", "log"),
        ("log.py", "import metrics", "metrics"),
        ("metrics.py", "from models import Status", "models.Status"),
        ("settings.py", "from log import event", "log.event"),
        ("repositories/records.py", "from database import transaction", "database.transaction"),
        ("repositories/records.py", "from services import history", "services.history"),
        ("engine/engine.py", "from errors import ServiceError", "errors.ServiceError"),
        ("engine/engine.py", "import log", "log"),
        ("engine/engine.py", "import fastapi", "fastapi"),
        ("engine/engine.py", "import starlette.concurrency", "starlette.concurrency"),
        ("engine/engine.py", "from sqlalchemy import text", "sqlalchemy.text"),
        ("engine/engine.py", "import pydantic_settings", "pydantic_settings"),
        ("services/model_host.py", "import torch", "torch"),
        ("services/model_host.py", "def f():\n    from torch import nn", "torch.nn"),
        ("main.py", "import transformers", "transformers"),
        ("api/history.py", "from repositories import records", "repositories.records"),
        ("api/history.py", "import engine.engine", "engine.engine"),
        ("api/history.py", "from database import Database", "database.Database"),
        ("api/history.py", "import database", "database"),
        ("api/history.py", "import sqlite_file", "sqlite_file"),
        ("connections.py", "from models import Status", "models.Status"),
        ("repositories/records.py", "import connections", "connections"),
        ("api/history.py", "from sqlalchemy.orm import Session", "sqlalchemy.orm.Session"),
        ("api/errors.py", "from sqlalchemy import select", "sqlalchemy.select"),
        ("services/history.py", "from fastapi import HTTPException", "fastapi.HTTPException"),
        ("services/history.py", "import starlette", "starlette"),
        ("services/history.py", "from api import errors", "api.errors"),
        ("services/history.py", "import main", "main"),
        ("api/history.py", "from main import app", "main.app"),
        ("services/history.py", "import manage", "manage"),
        ("manage.py", "from repositories import records", "repositories.records"),
        ("database.py", "import main", "main"),
        ("database.py", "from repositories import records", "repositories.records"),
        ("services/history.py", "from . import replay", "..replay"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, line: str, name: str) -> None:
    assert forbidden(path, f"import json\n{line}\n") == [name]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("settings.py", "from errors import StartError"),
        ("repositories/records.py", "from repositories import leases"),
        ("engine/engine.py", "import torch"),
        ("api/dependencies.py", "from database import get_db"),
        ("api/errors.py", "from sqlalchemy.exc import DBAPIError"),
        ("services/history.py", "from engine.sampling import FinishReason"),
    ],
)
def test_an_import_downwards_is_allowed(path: str, line: str) -> None:
    assert forbidden(path, line) == []
