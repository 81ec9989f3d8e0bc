"""Put into one sentence what mpirun says in twenty lines where it could not start ranks on a host."""

import re
from collections.abc import Iterable

NO_DAEMON = "A daemon failed to report back"
NO_PROGRAM = "unable to find the specified executable"
NO_STEP = "srun returned non-zero exit status"


def explain(lines: Iterable[str]) -> str | None:
    """Give the sentence for mpirun's notices among these lines; None where they say nothing of a start that failed."""
    text = "\n".join(lines)
    host = find(r"(?:Remote host|Node):\s*(\S+)", text)
    if NO_DAEMON in text:
        status = find(r"Daemon exit status:\s*(\S+)", text)
        return (
            f"mpirun could not start its daemon on {host} (exit status {status}): `ssh {host} true` has to work "
            "without a password, the environment has to be at the same path there, and no firewall between"
        )
    if NO_PROGRAM in text:
        program = find(r"Executable:\s*(\S+)", text)
        return f"{host} has no {program}: install the environment at the same path on every host"
    if NO_STEP in text:
        return "srun could not start mpirun's daemons on all hosts of the allocation: look for its words above"
    return None


def find(pattern: str, text: str) -> str:
    """Give what a pattern's group matches, `?` where it does not."""
    match = re.search(pattern, text)
    return match[1] if match else "?"
