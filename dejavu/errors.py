"""Errors that a user meets, each with the exit code that the command line ends with."""


class DejavuError(Exception):
    """Report a failure at run time; the message is one lowercase sentence with the value and the remedy."""

    exit_code = 1


class UsageError(DejavuError):
    """Report input that cannot be served: found before any weight is loaded."""

    exit_code = 2


class ConfigError(UsageError):
    """Report an option or a profile key that is unknown or has an impossible value."""


class TopologyError(UsageError):
    """Report ranks, layers or heads that do not divide as asked."""


class ModelError(UsageError):
    """Report a model that cannot be found, read, or that has a shape this program does not know."""


class WorkloadError(UsageError):
    """Report a malformed workload: names the file and the line."""


class CapacityError(UsageError):
    """Report memory that does not hold what was asked for, with what would fit."""


class TransferError(DejavuError):
    """Report a transfer that failed or was cancelled."""


class DeviceError(DejavuError):
    """Report a device that is missing, or one that refused a call: names the call, the code and its meaning."""


class PeerLostError(DejavuError):
    """Report a rank that died or stopped answering."""


class EndedByPeerError(PeerLostError):
    """Report that another rank has ended the job; that rank knows why."""


class RunLostError(PeerLostError):
    """Report that the run cannot go on in place, and is to be started again from its journal."""


class DeadlineError(DejavuError):
    """Report a wait that passed its deadline."""
