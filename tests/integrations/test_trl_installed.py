"""Shows that a TRL that is missing or too old is named as such, and that the public names are those that the reference lists."""

from importlib.metadata import PackageNotFoundError

import pytest

from producer.integrations import trl
from tests.test_docs import table


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


def test_a_trl_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "version", missing)
    with pytest.raises(ImportError, match=r"pip install 'millrace\[trl\]'"):
        trl._check_installed()
    monkeypatch.setattr(trl, "version", lambda name: "1.9.3")
    with pytest.raises(ImportError, match=r"TRL 1\.9\.3 is too old: this needs 1\.10"):
        trl._check_installed()
    monkeypatch.setattr(trl, "version", lambda name: "2.0.0.dev0")
    trl._check_installed()


def test_the_names_are_those_of_the_reference() -> None:
    assert sorted(row[0].strip("`") for row in table("reference/api.md", "`producer.integrations.trl`")) == sorted(trl.__all__)
