"""What a worker says of KV that it lost, until somebody is known to have heard it."""

from dejavu.cluster.keeping import RestoredPool
from dejavu.cluster.site import Holdings
from dejavu.engine.handover import Listener
from dejavu.engine.messages import Expect
from dejavu.kv.replica import HeldRow

ROWS = {(0, 1): HeldRow(5, 3, (0,))}


def test_a_loss_is_told_again_until_a_pass_or_a_prompt_comes():
    holdings = Holdings(None, None, None, None)
    assert holdings.is_new
    first = holdings.tell(RestoredPool(ROWS, nbytes=64, has_new_store=True))
    assert (first.tokens, first.nbytes, first.has_new_store) == ({5: 3}, 64, True)
    again = holdings.tell(RestoredPool())  # a further failure came before the controller could decide anything
    assert (holdings.has_kv, holdings.is_new) == (False, False)
    assert (again.tokens, again.nbytes, again.has_new_store) == ({5: 3}, 0, False)
    Listener(holdings.count_as_known).take(Expect(6, 3, (1,)))
    assert holdings.has_kv
    assert holdings.tell(RestoredPool()).tokens == {}
