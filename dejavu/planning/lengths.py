"""Say how long a request is: all that a planner or simulator knows of it."""

from typing import NamedTuple


class Lengths(NamedTuple):
    """Give a request's prompt and output tokens, and when it arrives (seconds after the start)."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float = 0.0
