"""What a long step shows of itself.

Run: python -m helpers test tests/unit/helpers/test_files.py
"""

import pytest

from helpers.files import progress_bar


@pytest.mark.parametrize("updates", [0, 1, 20])
def test_where_nothing_is_painted_over_a_step_says_that_it_begins_and_that_it_ends(
    monkeypatch, capsys, updates
):
    clock = iter(range(1000))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    with progress_bar("Copying", updates or None) as bar:
        for _ in range(updates):
            bar.update(1)
    assert capsys.readouterr().out.count("Copying") == 2


def test_a_terminal_sees_it_move(monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with progress_bar("Copying", 20) as bar:
        for _ in range(20):
            bar.update(1)
    assert capsys.readouterr().out.count("Copying") > 10
