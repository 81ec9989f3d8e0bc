"""Who was lost with a run is known to whoever goes on with it."""

from dejavu.engine.journal import Past
from dejavu.engine.losses import note_losses, take_losses
from dejavu.engine.recovery import Death
from dejavu.measure.failures import FailureRecord

CONTROLLER, STAGE = Death("controller", 0, None), Death("stage 1", 2, None, "hang", 6.0)


def test_losses_that_several_ranks_tell_of_count_once(tmp_path):
    note_losses(tmp_path, [(CONTROLLER, 20.0), (STAGE, 20.5)])
    note_losses(tmp_path, [(CONTROLLER, 20.1)])
    note_losses(tmp_path / "elsewhere", [(CONTROLLER, 20.0)])
    over = FailureRecord(0, "controller", 0, "death", detected_s=1.0, resumed_s=1.5)
    past = Past(origin_s=12.5, failures=[over])
    take_losses(tmp_path, past)
    found = [(record.failure_id, record.target, record.rank, record.kind) for record in past.failures[1:]]
    assert found == [(1, "controller", 0, "death"), (2, "stage 1", 2, "hang")]
    assert [record.detected_s for record in past.failures[1:]] == [7.5, 8.0]
    assert past.failures[2].injected_s == 6.0
    take_losses(tmp_path / "elsewhere", past)
    assert len(past.failures) == 3
