"""Say beforehand whether swapping pays: what a fetch of a microbatch takes, beside the step that it has to hide under.

In one fixed memory for KV a pipeline of D stages holds D microbatches, or two of D/2 times the rows, if the others are
in host memory. A step of the larger ones takes as long, as far as weights decide, so the same requests need fewer
steps; each has to wait for the fetch of its microbatch, which grows with every token.
"""

from dataclasses import dataclass

from dejavu.errors import UsageError
from dejavu.planning.times import check_times


@dataclass(frozen=True, slots=True)
class SwapCase:
    """Describe equal requests on one stage: `batch` rows a microbatch while swapping, `factor` times those without.

    `token_s` is one stage's step, `bytes_per_token` the KV of a token of a row there, `bandwidth` the link's, bytes/s.
    """

    prompt_len: int
    output_len: int
    batch: int
    token_s: float
    bytes_per_token: float
    bandwidth: float
    factor: float = 2.0

    def __post_init__(self) -> None:
        check_times(token_s=self.token_s, bytes_per_token=self.bytes_per_token)
        if not self.bandwidth > 0:
            raise UsageError(f"a host link of {self.bandwidth:g} bytes/s moves nothing: give more than 0")

    def fetch_s(self, context: int) -> float:
        """Give the time of the fetch of a microbatch with `context` tokens in each row."""
        return context * self.batch * self.bytes_per_token / self.bandwidth

    @property
    def pays_by_formula(self) -> bool:
        """Tell whether the paper's 2·N·t ≥ Σ max(t, i·B·C/bandwidth) holds, i over the N steps: without prompts."""
        return swapping_pays(self.output_len, self.token_s, self.batch, self.bytes_per_token, self.bandwidth)

    def steps_s(self) -> float:
        """Give the time of all steps, each as long as its compute or its fetch."""
        contexts = range(self.prompt_len + 1, self.prompt_len + self.output_len + 1)
        return sum(max(self.token_s, self.fetch_s(context)) for context in contexts)

    @property
    def speedup(self) -> float:
        """Give how much faster token steps are through with swapping: factor·N·t over their time, prompts counted."""
        return self.factor * self.output_len * self.token_s / self.steps_s() if self.token_s else 0.0

    @property
    def pays(self) -> bool:
        """Tell whether swapping is at least as fast, the KV of prompts counted."""
        return self.speedup >= 1

    def row(self) -> dict[str, int | float | bool]:
        """Give what a plan shows."""
        return {
            "prompt_len": self.prompt_len,
            "output_len": self.output_len,
            "batch_without": round(self.batch / self.factor),
            "batch_with": self.batch,
            "token_ms": 1e3 * self.token_s,
            "first_fetch_ms": 1e3 * self.fetch_s(self.prompt_len + 1),
            "last_fetch_ms": 1e3 * self.fetch_s(self.prompt_len + self.output_len),
            "speedup": self.speedup,
            "pays": self.pays,
            "pays_by_formula": self.pays_by_formula,
        }

    def verdict(self) -> str:
        """Say it in words."""
        word = "pays" if self.pays else "does not pay"
        first, last = 1e3 * self.fetch_s(self.prompt_len + 1), 1e3 * self.fetch_s(self.prompt_len + self.output_len)
        return (
            f"swapping {word}: token steps of {1e3 * self.token_s:.3g} ms hide fetches of {first:.3g} to {last:.3g} ms "
            f"or wait for them, {self.batch} rows a microbatch in place of {self.batch / self.factor:.3g}: "
            f"{self.speedup:.2f} times the speed without"
        )


def swapping_pays(output_len: int, token_s: float, batch: int, bytes_per_token: float, bandwidth: float) -> bool:
    """Tell whether 2·N·t ≥ Σ max(t, i·B·C/bandwidth) over the N steps: the fetches fit under twice the compute."""
    check_times(token_s=token_s, bytes_per_token=bytes_per_token)
    steps = (max(token_s, i * batch * bytes_per_token / bandwidth) for i in range(1, output_len + 1))
    return 2 * output_len * token_s >= sum(steps)
