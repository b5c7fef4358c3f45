"""What is announced is heard inside, by this thread, unless someone reads all frames."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from cosmos3_fast.vae.live.announce import all_frames, announced, wanted_at, wanted_frames


def test_nested() -> None:
    assert announced() is None
    with wanted_frames(3):
        assert announced() == 3
        with wanted_frames(None):
            assert announced() is None
        assert announced() == 3
    assert announced() is None


def test_someone_reads_all_frames() -> None:
    with wanted_frames(2):
        with all_frames():
            assert announced() is None
            with wanted_frames(1):
                assert announced() is None
        assert announced() == 2


def test_other_threads_do_not_hear_it() -> None:
    heard: list[Any] = []
    with wanted_frames(1):
        thread = threading.Thread(target=lambda: heard.append(announced()))
        thread.start()
        thread.join()
    assert heard == [None]


@pytest.mark.parametrize(
    ("indexes", "wanted"), [((), 0), ((0,), 1), ((2, 0), 3), ((3,), None), ((-1,), None)]
)
def test_indexes(indexes: Any, wanted: int | None) -> None:
    assert wanted_at(iter(indexes), 3) == wanted
