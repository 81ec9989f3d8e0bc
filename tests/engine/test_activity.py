from dejavu.engine.activity import FRESH_S, Activity
from dejavu.engine.messages import Busy


def test_share_is_of_the_time_since_the_last_word():
    activity = Activity()
    activity.take(1, Busy(0.1), 1.0)
    activity.take(1, Busy(0.25), 1.5)
    assert activity.share(1, 1.6) == 0.5


def test_silence_is_idleness():
    activity = Activity()
    activity.take(1, Busy(0.5), 1.0)
    assert activity.share(1, 1.0 + FRESH_S) == 0.0
    assert activity.share(2, 1.0) == 0.0


def test_a_pass_that_was_told_late_counts_no_more_than_all_the_time():
    activity = Activity()
    activity.take(3, Busy(9.0), 10.0)
    assert activity.share(3, 10.0) == 1.0


def test_swaps_of_all_ranks_are_counted():
    activity = Activity()
    activity.take(1, Busy(0.1, 3, 1000), 1.0)
    activity.take(2, Busy(0.1, 2, 500), 1.0)
    assert (activity.num_fetches, activity.swapped_bytes) == (5, 1500)
