"""Choice of the rows of a datastore that travels with a checkpoint."""

import random

from layerskip.model.draft_data import most_repeated

END = 99
SMALL_TALK = random.Random(0)


def unlike():
    return [*(SMALL_TALK.randrange(1000, 9000) for _ in range(8)), END]


def test_rows_that_others_repeat_come_first_each_form_once():
    alarms = [[1, 2, 3, 4, 5, 6, END]] * 9
    weather = [[11, 12, 13, 14, 15, 16, END]] * 5
    rows = [*alarms, *weather, *(unlike() for _ in range(4))]
    random.Random(1).shuffle(rows)
    assert most_repeated(rows) == (*alarms[0], *weather[0])


def test_rows_without_anything_in_common_make_no_text():
    assert most_repeated([unlike() for _ in range(50)]) == ()
    assert most_repeated([]) == ()
    assert most_repeated([[1], [1]]) == ()  # too short for a run


def test_a_text_is_no_longer_than_asked():
    rows = [[1, 2, 3, 4, 5, 6, 7, 8, END]] * 3 + [[11, 12, 13, 14, END]] * 2
    assert most_repeated(rows, at_most=9) == tuple(rows[0])
    assert most_repeated(rows, at_most=8) == tuple(rows[-1])


def test_thousands_of_rows_are_a_sample():
    rows = [[1, 2, 3, 4, END], [11, 12, 13, 14, END]] * 30_000
    assert most_repeated(rows) in ((1, 2, 3, 4, END), (11, 12, 13, 14, END), (*rows[0], *rows[1]))
