"""The tuner's cache file: what one process measured is known to the next, and a bad file or no home stops nobody."""

import importlib.resources
import json

import pytest

from lora_fast import tuning


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._known.cache_clear()
    yield
    tuning._known.cache_clear()


@pytest.mark.parametrize(
    "content",
    [
        *(None, b"", b"\xff\xfe", b"[]", b"{}", b'{"schema_version": 2}', b'{"schema_version": 2, "gpus": []}'),
        b'{"schema_version": 2, "gpus": {"a GPU": {"torch, triton": {"step M=8": "triton"}}}}',
        b'{"schema_version": 1, "gpus": {"a GPU": {"step M=8": {"choice": "cublas", "ms": {}}}}}',  # without versions
    ],
)
def test_what_was_measured_is_known_whatever_was_there_before(content):
    path = tuning.cache_file()
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    assert tuning._known() == {}
    tuning._remember("a GPU", "step M=8", "triton", {"triton": 0.12345, "cublas": 1.0})
    tuning._remember("a GPU", "step M=16", "cublas", {"cublas": 1.0})
    tuning._known.cache_clear()
    assert tuning._known() == {("a GPU", "step M=8"): "triton", ("a GPU", "step M=16"): "cublas"}
    assert [file.name for file in path.parent.iterdir()] == ["tuning.json"]


def test_without_a_home_nothing_is_kept(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tuning.Path, "home", no_home)
    assert tuning._known() == {}
    tuning._remember("a GPU", "step", "triton", {"triton": 1.0})


def table(**rows: dict[str, str]) -> str:
    """A table of "a GPU": versions → {step: choice}."""
    tables = {versions: {key: {"choice": choice} for key, choice in of.items()} for versions, of in rows.items()}
    return json.dumps({"schema_version": tuning.SCHEMA_VERSION, "gpus": {"a GPU": tables}})


def test_rows_of_other_versions_hold_in_the_shipped_table_only(monkeypatch):
    monkeypatch.setattr(tuning, "versions", lambda: "running")
    text = table(earlier={"one": "a", "two": "b"}, later={"two": "c", "three": "d"}, running={"three": "e"})
    assert tuning.read_table(text, any_versions=False) == {("a GPU", "three"): "e"}
    every = {("a GPU", key): choice for key, choice in {"one": "a", "two": "b", "three": "e"}.items()}
    assert tuning.read_table(text, any_versions=True) == every


def test_what_ships_goes_before_what_this_machine_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "files", lambda package: tmp_path)
    (tmp_path / "tuned.json").write_text(table(earlier={"one": "shipped"}))
    tuning._remember("a GPU", "one", "timed", {})
    tuning._remember("a GPU", "two", "timed", {})
    assert tuning._known() == {("a GPU", "one"): "shipped", ("a GPU", "two"): "timed"}


def test_the_table_that_ships_is_one_of_this_schema():
    shipped = (importlib.resources.files("lora_fast") / "tuned.json").read_text(encoding="utf-8")
    assert json.loads(shipped)["schema_version"] == tuning.SCHEMA_VERSION
