"""The tuner's cache file: what one process measured is known to the next, and a bad file or no home stops nobody."""

import pytest

from lora_fast import tuning


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._known.cache_clear()
    yield
    tuning._known.cache_clear()


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe", b"[]", b"{}", b'{"schema_version": 1, "gpus": []}', b'{"schema_version": 1}']
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
