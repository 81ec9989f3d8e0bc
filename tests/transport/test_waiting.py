import time

import pytest

from dejavu.errors import DeadlineError
from dejavu.transport.waiting import LONGEST_S, Doorbell, Patience, new_job_name


@pytest.fixture
def bells():
    job = new_job_name()
    made = [Doorbell(job, 0, "127.0.0.1"), Doorbell(job, 1)]
    yield made
    for bell in made:
        bell.close()


def slept_s(bell, seconds):
    started = time.monotonic()
    rung_far = bell.sleep(seconds)
    return time.monotonic() - started, rung_far


def test_a_rank_of_this_host_wakes_a_sleeper_and_one_elsewhere_tells_so(bells):
    sleeper, other = bells
    other.ring(0)
    duration_s, rung_far = slept_s(sleeper, 5.0)
    assert duration_s < 4.0
    assert not rung_far
    other.ring_far(sleeper.door)
    other.ring_far(sleeper.door)
    duration_s, rung_far = slept_s(sleeper, 5.0)
    assert duration_s < 4.0
    assert rung_far
    assert slept_s(sleeper, 0.01)[1] is False  # all rings were taken


def test_only_a_rank_of_this_host_raises_the_alarm(bells):
    sleeper, other = bells
    other.far.sendto(b"!", sleeper.door)
    assert sleeper.sleep(5.0)
    assert not sleeper.has_alarm
    other.ring(0, alarm=True)
    sleeper.sleep(5.0)
    assert sleeper.has_alarm


def test_who_cannot_be_reached_costs_nothing(bells):
    bells[1].ring_far(("127.0.0.1", 9))
    bells[1].ring_far(("0.0.0.0", 0))
    assert bells[1].door is None


def test_pauses_grow_until_something_is_on_its_way(monkeypatch):
    now_s, pauses = 100.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now_s)

    def sleep(seconds):
        nonlocal now_s
        pauses.append(seconds)
        now_s += max(seconds, 1e-3)
        return len(pauses) == 200

    patience = Patience("a ring", 60.0, sleep)
    for _ in range(202):
        patience.pause()
    assert pauses[199] == LONGEST_S
    assert pauses[200] < 1e-3 < pauses[100]
    now_s += 60.0
    with pytest.raises(DeadlineError, match="a ring"):
        patience.pause()
