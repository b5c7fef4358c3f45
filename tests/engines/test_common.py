"""What the environment variable asks for."""

from __future__ import annotations

import pytest

from cosmos3_fast.engines.common import MODE_VARIABLE, choice_from_environment
from cosmos3_fast.vae.live.paths import Choice


@pytest.mark.parametrize(
    ("value", "choice"),
    [
        (None, Choice("exact", clips=False)),
        ("", Choice("exact", clips=False)),
        (" Fast ", Choice("fast", clips=False)),
        ("fast, clips", Choice("fast", clips=True)),
        ("FAST,CLIPS", Choice("fast", clips=True)),
        ("fast,graphs", Choice("fast", clips=False, graphs=True)),
        ("fast,graphs,clips", Choice("fast", clips=True, graphs=True)),
        ("off", Choice("off", clips=False)),
    ],
)
def test_choices(monkeypatch: pytest.MonkeyPatch, value: str | None, choice: Choice) -> None:
    monkeypatch.delenv(MODE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(MODE_VARIABLE, value)
    assert choice_from_environment() == choice


@pytest.mark.parametrize(
    "value", ["quick", "clips", "exact,clips", "fast,", "fast,clips,clips", "fast,graph"]
)
def test_others_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(MODE_VARIABLE, value)
    with pytest.raises(ValueError, match=f"{MODE_VARIABLE} must be"):
        choice_from_environment()
