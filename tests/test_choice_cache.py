"""Measured choices on disk: whole files, one per key, and what is wrong with one is said and survived."""

import json
import logging
import threading

import pytest

from swin_moe import choice_cache

OPTION = "model.moe.tune"
KEY = {"tokens": 12, "hosts": [0, 0, 1]}


def test_a_choice_is_kept_per_key(tmp_path, caplog):
    assert choice_cache.read(tmp_path / "new", KEY, option=OPTION) is None
    choice_cache.write(tmp_path / "new", KEY, {"choice": "a"}, option=OPTION)
    choice_cache.write(tmp_path / "new", KEY | {"tokens": 13}, {"choice": "b"}, option=OPTION)
    assert choice_cache.read(tmp_path / "new", KEY, option=OPTION) == {"choice": "a"}
    assert choice_cache.read(tmp_path / "new", KEY | {"tokens": 13}, option=OPTION) == {"choice": "b"}
    assert choice_cache.read(tmp_path / "new", KEY | {"hosts": [0, 1, 1]}, option=OPTION) is None
    assert not caplog.records and not list((tmp_path / "new").glob(".new-*"))
    choice_cache.write(tmp_path, KEY, ["not a choice"], option=OPTION)
    assert choice_cache.read(tmp_path, KEY, option=OPTION) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', '{"format": "other"}', None, b"\xff\xfe"])
def test_a_broken_or_foreign_file_is_ignored_with_one_line(tmp_path, caplog, text):
    path = choice_cache.path_of(tmp_path, KEY)
    if text is None:  # a file under the wrong name
        choice_cache.write(tmp_path, KEY | {"tokens": 1}, {"choice": "b"}, option=OPTION)
        choice_cache.path_of(tmp_path, KEY | {"tokens": 1}).rename(path)
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    logger = logging.getLogger("swin_moe")
    logger.addHandler(caplog.handler)
    try:
        assert choice_cache.read(tmp_path, KEY, option=OPTION) is None
    finally:
        logger.removeHandler(caplog.handler)
    assert len({record.getMessage() for record in caplog.records}) == 1
    assert f"{path} is ignored and measured anew" in caplog.text
    choice_cache.write(tmp_path, KEY, {"choice": "c"}, option=OPTION)
    assert choice_cache.read(tmp_path, KEY, option=OPTION) == {"choice": "c"}


def test_a_directory_that_cannot_be_written_to_ends_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    logger = logging.getLogger("swin_moe")
    logger.addHandler(caplog.handler)
    try:
        choice_cache.write(tmp_path / "file" / "below", KEY, {"choice": "a"}, option=OPTION)
    finally:
        logger.removeHandler(caplog.handler)
    assert "could not be kept in" in caplog.text


def test_writers_and_readers_at_the_same_time_see_whole_files(tmp_path, monkeypatch):
    big = {"choice": "x" * 20000}
    choice_cache.write(tmp_path, KEY, big, option=OPTION)
    monkeypatch.setattr(choice_cache.LOGGER, "warning", lambda *a: pytest.fail(a[0] % a[1:]))

    def write_often():
        for _ in range(50):
            choice_cache.write(tmp_path, KEY, big, option=OPTION)

    writers = [threading.Thread(target=write_often) for _ in range(3)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        assert choice_cache.read(tmp_path, KEY, option=OPTION) == big
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert json.loads(choice_cache.path_of(tmp_path, KEY).read_text())["key"] == KEY


def test_the_default_directory_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice_cache.default_directory() == tmp_path / "swin_moe" / "tuned"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert choice_cache.default_directory() == tmp_path / "home" / ".cache" / "swin_moe" / "tuned"
