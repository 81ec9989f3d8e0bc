"""The comparison with transformers, on a tiny checkpoint: the same tokens, and its columns."""

import json

from tests.benchmarks.test_microbench import run_bench
from tests.documentation import unexplained
from tests.model_zoo import make_checkpoint


def test_the_engine_generates_what_transformers_generates(tmp_path):
    make_checkpoint("llama", tmp_path / "model")
    out = tmp_path / "run"
    case = ("--dtype", "float32", "--batch", "2", "--prompt-len", "6", "--output-len", "8", "--threads", "1")
    more = ("--peer", "transformers", "--repeats", "1", "--out", str(out))
    done, text = run_bench("generate", "--model", str(tmp_path / "model"), *case, *more, timeout=110)
    assert done.returncode == 0, text
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert unexplained("benchmarks.md", "bench generate", row) == []
    assert (row["batch"], row["prompt_len"], row["output_len"], row["dtype"]) == (2, 6, 8, "float32")
    assert row["same_tokens"] == 1.0
    assert abs(row["ratio"] - row["tokens_per_s"] / row["peer_tokens_per_s"]) < 1e-9 * row["ratio"]
    assert (out / "generate.csv").exists()
