"""Addresses: drivers are filled in, and no spelling of a password survives masking."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database.urls import mask, parse, secrets_of

# Letters that occur nowhere else in the addresses below, so that finding them means a leak.
SECRETS = st.text("QZX@:/?#%&=+ *", min_size=4, max_size=12).filter(lambda s: len(s.strip("@:/?#%&=+ *")) >= 2)


def _leaks(printed: str) -> bool:
    return any(letter in printed for letter in "QZX")


@given(SECRETS)
def test_encoded_password_is_masked(secret: str) -> None:
    encoded = quote(secret, safe="")
    for url in (f"postgresql://user:{encoded}@host/name", f"mysql://host/name?password={encoded}&charset=utf8mb4"):
        printed = mask(url)
        assert secret not in printed
        assert encoded not in printed
        assert "***" in printed
        assert "host/name" in printed


@given(SECRETS)
@example("QZ@QZ")
@example("Q/Z@Q?X")
def test_raw_password_is_masked_in_messages_too(secret: str) -> None:
    url = f"postgresql://user:{secret}@host/name"
    assert not _leaks(mask(url).replace("%", ""))
    try:
        printed = parse(url).render_as_string(hide_password=True)
    except InputError as error:
        printed = str(error)
    assert not _leaks(printed)


@pytest.mark.parametrize(
    "url",
    ["sqlite:///runs.db", "sqlite:////data/a@b.db", "postgresql://user@host:5432/name", "mysql://host/name?charset=x"],
)
def test_address_without_password_is_printed_as_it_is(url: str) -> None:
    assert mask(url) == url


@pytest.mark.parametrize(
    ("given_url", "driver"),
    [
        ("postgresql://u@h/d", "postgresql+psycopg"),
        ("postgres://u@h/d", "postgresql+psycopg"),
        ("mysql://u@h/d", "mysql+pymysql"),
        ("mariadb://u@h/d", "mysql+pymysql"),
        ("postgresql+psycopg2://u@h/d", "postgresql+psycopg2"),
    ],
)
def test_driver_is_filled_in(given_url: str, driver: str) -> None:
    assert parse(given_url).drivername == driver


def test_sqlite_path_does_not_depend_on_the_folder_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("sqlite:///runs.db").database == str(tmp_path / "runs.db")


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("runs.db", "not an address"),
        ("", "not an address"),
        ("oracle://u@h/d", "not supported"),
        ("sqlite://", "plain file"),
        ("sqlite:///:memory:", "plain file"),
        ("sqlite:///file:x.db?uri=true", "plain file"),
        ("sqlite://folder/x.db", "no host"),
        ("postgresql://u@h", "names no database"),
        ("postgresql://u:p@ss@h/d", "cannot be read"),
        ("postgresql://u:p@h:port/d", "cannot be read"),
        ("postgresql://u/x:p@h/d", "cannot be read"),
    ],
)
def test_unusable_address_is_refused_in_one_line(url: str, part: str) -> None:
    with pytest.raises(InputError, match=part) as caught:
        parse(url)
    assert caught.value.field == "storage"
    assert "\n" not in str(caught.value)


def test_secrets_are_found_wherever_they_stand() -> None:
    url = parse("postgresql://u:first@h/d?password=second&sslpassword=third-and-longest&application_name=x")
    assert secrets_of(url) == ("third-and-longest", "second", "first")
