"""Each setting is documented, and a wrong value stops the start with one line that names it."""

import re

import pytest
from pydantic import ValidationError

from errors import StartError
from settings import Settings, load_settings
from tests.service import ROOT

NAMES = [name.upper() for name in Settings.model_fields]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_lists_each_setting(name: str) -> None:
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"^\| `{name}` \|", readme, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_says_what_it_takes(name: str) -> None:
    assert Settings.model_fields[name.lower()].description


def test_the_readme_lists_no_setting_that_is_gone() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", readme, re.MULTILINE))
    assert listed == set(NAMES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mongodb://host/name"),
        ("DATABASE_URL", "records.db"),
        ("DTYPE", "float8"),
        ("DEVICE", "abacus"),
        ("CACHE_TTL_SECONDS", "-1"),
        ("REDIS_URL", "http://host"),
        ("IDEMPOTENCY_HOURS", "23"),
        ("MAX_WAITING", "0"),
        ("MAX_WAITING", "many"),
        ("REQUEST_TIMEOUT_SECONDS", "0"),
        ("REQUEST_TIMEOUT_SECONDS", "nan"),
        ("REQUEST_TIMEOUT_SECONDS", "inf"),
        ("DRAIN_SECONDS", "-1"),
        ("REQUEST_THREADS", "7"),
        ("MAX_BODY_BYTES", "1.5"),
        ("DATABASE_TIMEOUT_SECONDS", "-1"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "LOUD"),
        ("PORT", "65536"),
        ("PORT", "http"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartError) as caught:
        load_settings()
    line = str(caught.value)
    assert line.startswith(f"{name} is not usable: it takes ")
    assert "\n" not in line
    assert not isinstance(caught.value.__cause__, ValidationError)


def test_a_password_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "mongodb://user:canary4711@host/name")
    with pytest.raises(StartError) as caught:
        load_settings()
    assert "canary4711" not in str(caught.value)


def test_an_empty_value_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "")
    monkeypatch.setenv("PORT", "")
    assert (load_settings().model, load_settings().port) == (None, 8000)


def test_words_are_split_at_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORBIDDEN_WORDS", " bad word, worse ,,")
    assert load_settings().forbidden_words == ("bad word", "worse")
    monkeypatch.setenv("FORBIDDEN_WORDS", ",")
    assert load_settings().forbidden_words == ()


def test_a_dotenv_file_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(".env", "w") as file:
        file.write("PORT=8123\nSOMETHING_ELSE=1\n")
    assert load_settings().port == 8123
    monkeypatch.setenv("PORT", "8124")
    assert load_settings().port == 8124
