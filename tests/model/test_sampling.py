"""The next token: processed logits against transformers, draws against softmax, and that a draw is a pure function."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from dejavu.model.sampling import (
    RowState,
    Sampled,
    banned_tokens,
    draw_key,
    gumbel_noise,
    process_logits,
    sample,
)
from dejavu.request import SamplingParams

VOCAB = 211
EOS = (7,)


def make_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def make_row(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> RowState:
    return RowState(SamplingParams(**params), EOS, prompt or [1, 2, 3], output or [])


def tokens(logits: torch.Tensor, rows: list[RowState]) -> list[int]:
    return [sampled.token_id for sampled in sample(logits, rows)]


def random_histories(num_rows: int) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(4)
    return [(rng.choices(range(VOCAB), k=9), rng.choices(range(VOCAB), k=6)) for _ in range(num_rows)]


REFERENCES: dict[str, tuple[dict[str, Any], Any]] = {
    "repetition": (
        {"repetition_penalty": 1.7},
        lambda p: [reference.RepetitionPenaltyLogitsProcessor(1.7)],
    ),
    "temperature": ({"temperature": 0.6}, lambda p: [reference.TemperatureLogitsWarper(0.6)]),
    "top_k": ({"temperature": 1.0, "top_k": 17}, lambda p: [reference.TopKLogitsWarper(17)]),
    "top_k above the vocabulary": ({"temperature": 1.0, "top_k": 999}, lambda p: [reference.TopKLogitsWarper(999)]),
    "top_p": ({"temperature": 1.0, "top_p": 0.8}, lambda p: [reference.TopPLogitsWarper(0.8)]),
    "top_p small": ({"temperature": 1.0, "top_p": 0.01}, lambda p: [reference.TopPLogitsWarper(0.01)]),
    "min_tokens": (
        {"min_tokens": 7, "stop_token_ids": (9,)},
        lambda p: [reference.MinNewTokensLengthLogitsProcessor(p, 7, [7, 9], device="cpu")],
    ),
    "min_tokens reached": (
        {"min_tokens": 6},
        lambda p: [reference.MinNewTokensLengthLogitsProcessor(p, 6, [7], device="cpu")],
    ),
    "everything": (
        {
            "bad_words_ids": ((3,), (5, 8)),
            "min_tokens": 9,
            "repetition_penalty": 0.8,
            "temperature": 1.3,
            "top_k": 40,
            "top_p": 0.7,
        },
        lambda p: [
            reference.NoBadWordsLogitsProcessor([[3], [5, 8]], eos_token_id=None),
            reference.MinNewTokensLengthLogitsProcessor(p, 9, [7], device="cpu"),
            reference.RepetitionPenaltyLogitsProcessor(0.8),
            reference.TemperatureLogitsWarper(1.3),
            reference.TopKLogitsWarper(40),
            reference.TopPLogitsWarper(0.7),
        ],
    ),
}


@pytest.mark.parametrize("case", REFERENCES, ids=str)
def test_process_logits_matches_transformers(case):
    params, processors = REFERENCES[case]
    logits, histories = make_logits(8), random_histories(8)
    got = process_logits(logits, [make_row(prompt, output, **params) for prompt, output in histories])
    expected = logits
    for processor in processors(9):
        expected = processor(torch.tensor([prompt + output for prompt, output in histories]), expected)
    assert not torch.equal(expected, logits) or case in ("min_tokens reached", "top_k above the vocabulary")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "output"),
    [([1, 2], []), ([1, 5], []), ([5], [8, 6]), ([2], [5, 8, 6]), ([8], [6]), ([5, 8], [6]), ([9], [5, 8, 6, 5])],
    ids=str,
)
def test_bad_words_match_the_end_of_the_history(prompt, output):
    words = ((3,), (5, 4), (5, 8, 6, 2), (6, 6))
    logits = make_logits(1)
    got = process_logits(logits, [make_row(prompt, output, bad_words_ids=words)])
    processor = reference.NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    torch.testing.assert_close(got, processor(torch.tensor([prompt + output]), logits))


def test_frequency_and_presence_penalties_count_the_output_only():
    logits = make_logits(1)
    row = make_row([4, 4, 9], [5, 6, 5, 5], frequency_penalty=0.5, presence_penalty=0.25)
    expected = logits.clone()
    expected[0, 5] -= 3 * 0.5 + 0.25
    expected[0, 6] -= 0.5 + 0.25
    torch.testing.assert_close(process_logits(logits, [row]), expected)


def test_bias_comes_before_the_penalties_and_after_the_bans():
    logits = torch.zeros(1, VOCAB)
    row = make_row([1], [2], logit_bias=((2, 4.0), (3, -2.0), (8, 100.0)), repetition_penalty=2.0, presence_penalty=0.5)
    got = process_logits(logits, [row])[0]
    assert got[[2, 3, 8]].tolist() == [4.0 / 2.0 - 0.5, -2.0, 100.0]
    banned = make_row([1], [2], logit_bias=((8, 100.0),), bad_words_ids=((8,),))
    assert process_logits(logits, [banned])[0, 8] == -math.inf


def test_top_k_and_top_p_keep_equals_of_the_last_kept_token():
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]])
    top_k = process_logits(logits, [make_row(temperature=1.0, top_k=2)])
    top_p = process_logits(logits, [make_row(temperature=1.0, top_p=0.6)])
    for got in (top_k, top_p):
        assert torch.isfinite(got[0]).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("spread", [0.01, 4.0], ids=["wider than the guess", "narrower"])
def test_top_p_over_a_large_vocabulary(spread):
    logits = make_logits(3, vocab=5000, spread=spread)
    got = process_logits(logits, [make_row(temperature=1.0, top_p=p) for p in (0.1, 0.5, 0.999)])
    for index, top_p in enumerate((0.1, 0.5, 0.999)):
        probabilities = logits[index].double().softmax(-1)
        kept = torch.isfinite(got[index])
        least = probabilities[kept].min()
        assert probabilities[kept].sum() >= top_p
        assert probabilities[kept].sum() - least < top_p
        assert not (probabilities[~kept] > least).any()


def test_greedy_takes_the_lowest_of_equal_tokens():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    assert tokens(logits, [make_row(), make_row()]) == [1, 0]
    assert tokens(logits, [make_row(repetition_penalty=1.5, prompt=[1]), make_row(min_tokens=0, temperature=1e-9)]) == [
        2,
        0,
    ]


def test_greedy_rows_match_argmax_with_and_without_the_fast_path():
    logits = make_logits(6)
    plain = [make_row(max_tokens=40 + i, stop=("x",), seed=i, top_k=3, top_p=0.5) for i in range(6)]
    assert all(row.is_plain for row in plain)
    assert tokens(logits, plain) == logits.argmax(-1).tolist()
    assert tokens(logits, [*plain[:5], make_row(temperature=1.0)])[:5] == logits.argmax(-1).tolist()[:5]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.5},
        {"min_tokens": 1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": ((1, 1.0),)},
        {"bad_words_ids": ((1,),)},
        {"logprobs": 0},
    ],
    ids=str,
)
def test_rows_that_need_more_than_an_argmax_are_not_plain(params):
    assert not make_row(**params).is_plain


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Give the statistic in standard deviations from its mean (about normal with many cells)."""
    expected = probabilities.double() * counts.sum()
    used = expected >= 5
    statistic = float(((counts[used] - expected[used]) ** 2 / expected[used]).sum())
    freedom = int(used.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("params", [{}, {"top_k": 12}, {"top_p": 0.7}], ids=str)
def test_draws_follow_the_softmax(params):
    """Over 100 seeds times 100 positions."""
    logits = make_logits(1, 40, spread=1.0).expand(10_000, 40)
    rows = [make_row(output=[3] * (i % 100), temperature=0.9, seed=i // 100, **params) for i in range(10_000)]
    counts = torch.bincount(torch.tensor(tokens(logits, rows)), minlength=40)
    probabilities = process_logits(logits[:1], rows[:1]).softmax(-1)[0]
    assert counts[probabilities == 0].sum() == 0
    assert abs(chi_square(counts, probabilities)) < 4


def test_successive_draws_are_independent():
    """Pairs of draws at positions p and p + 1 of one seed, and of seeds s and s + 1, fill a 16 x 16 table evenly."""
    vocab = 16
    keys = torch.tensor([draw_key(seed, position) for seed in range(120) for position in range(120)]).to(torch.int32)
    drawn = gumbel_noise(keys[:, None], torch.arange(vocab, dtype=torch.int32)).argmax(-1).view(120, 120)
    for first, second in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        counts = torch.bincount((first * vocab + second).flatten(), minlength=vocab**2)
        assert abs(chi_square(counts, torch.full((vocab**2,), 1 / vocab**2))) < 4


def test_noise_is_gumbel_over_a_large_vocabulary():
    noise = gumbel_noise(torch.tensor(draw_key(11, 3), dtype=torch.int32), torch.arange(200_000, dtype=torch.int32))
    uniform = torch.exp(-torch.exp(-noise.double())).sort().values
    distance = (uniform - (torch.arange(200_000) + 0.5) / 200_000).abs().max()
    assert float(distance) < 1.95 / math.sqrt(200_000)  # Kolmogorov-Smirnov, 0.1 %
    assert torch.isfinite(noise).all()
    neighbours = torch.stack([noise[:-1], noise[1:]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.01


def python_noise(key: tuple[int, int], token_id: int) -> float:
    """Compute the noise a second time, with unbounded integers."""
    low, high = (half & 0xFFFFFFFF for half in key)
    mixed = (token_id * 0x9E3779B1 + low) & 0xFFFFFFFF
    mixed ^= mixed >> 16
    mixed = (mixed * 0x21F0AAAD + high) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    mixed = mixed * 0x735A2D97 & 0xFFFFFFFF
    mixed ^= mixed >> 15
    return -math.log(-math.log1p(-((mixed & 0x7FFFFFFF) + 0.5) / 2**31))


@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**20), st.integers(0, 2**18))
def test_noise_matches_plain_integers(seed, position, token_id):
    key = draw_key(seed, position)
    got = gumbel_noise(torch.tensor(key, dtype=torch.int32), torch.tensor([token_id], dtype=torch.int32))
    assert float(got[0]) == pytest.approx(python_noise(key, token_id), rel=1e-6)


def test_draw_keys_match_published_splitmix64():
    """The first two outputs of splitmix64 from state 1234567 (Rosetta Code's test vector), chained as documented."""
    first = 6457827717110365317
    low, high = draw_key(1234567, first)  # the xor cancels: the second round starts from state 0
    assert (high & 0xFFFFFFFF) << 32 | low & 0xFFFFFFFF == 0xE220A8397B1DCDAF


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([-0.5, 0.0]),
    min_tokens=st.integers(0, 4),
    logit_bias=st.sampled_from([(), ((3, 5.0), (7, -2.0))]),
    bad_words_ids=st.sampled_from([(), ((2,), (4, 5))]),
    stop_token_ids=st.sampled_from([(), (9,)]),
    logprobs=st.sampled_from([None, 0, 3]),
    seed=st.integers(0, 2**63),
)
row_strategy = st.builds(
    lambda params, prompt, output: RowState(params, EOS, prompt, output),
    params_strategy,
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    st.lists(st.integers(0, VOCAB - 1), max_size=6),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(row_strategy, min_size=1, max_size=6), st.integers(0, 1000), st.randoms())
def test_a_draw_depends_on_its_own_row_only(rows, seed, shuffler):
    logits = make_logits(len(rows), seed=seed)
    untouched, histories = logits.clone(), [(list(row.prompt), list(row.output)) for row in rows]
    together = sample(logits, rows)
    assert together == sample(logits, rows)
    assert torch.equal(logits, untouched)
    assert [(row.prompt, row.output) for row in rows] == histories
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    alone = [sample(logits[[i]], [rows[i]])[0] for i in range(len(rows))]
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert [s.token_id for s in together] == [s.token_id for s in alone]
    assert [s.token_id for s in shuffled] == [together[i].token_id for i in order]
    for row, sampled in zip(rows, together, strict=True):
        assert sampled.token_id not in banned_tokens(row)
        assert (sampled.logprobs is None) == (row.params.logprobs is None)


def test_truncation_does_not_move_the_noise():
    """A token that top-k keeps and that wins without it wins with it."""
    logits = make_logits(200, seed=3)
    free = tokens(logits, [make_row(temperature=1.0, seed=i) for i in range(200)])
    cut = tokens(logits, [make_row(temperature=1.0, seed=i, top_k=20) for i in range(200)])
    kept = [bool(logits[i, token] >= logits[i].topk(20).values[-1]) for i, token in enumerate(free)]
    assert 100 < sum(kept) < 200
    assert all(a == b for a, b, inside in zip(free, cut, kept, strict=True) if inside)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 50}], ids=str)
def test_noise_of_1e_6_in_the_logits_hardly_ever_changes_a_token(params):
    """The bound that the module states is 2e-6 per token: of 1500 draws from 5000 nearly even tokens, none."""
    rows = [make_row(temperature=1.0, seed=i, **params) for i in range(1500)]
    logits = make_logits(1, 5000, spread=0.5).expand(1500, -1).contiguous()
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    drawn = tokens(logits, rows)
    assert drawn == tokens(logits + noise * 1e-6, rows)
    moved = sum(a != b for a, b in zip(drawn, tokens(logits + noise * 1e-2, rows), strict=True))
    assert 0 < moved < 0.02 * 1500 * 2


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_the_raw_logits(temperature):
    logits = make_logits(4)
    rows = [
        make_row(temperature=temperature, logprobs=n, seed=i, logit_bias=((8, 50.0),), top_k=2)
        for i, n in enumerate((0, 5, None, 1))
    ]
    got = sample(logits, rows)
    expected = logits.double().log_softmax(-1)
    assert got[2] == Sampled(8)
    for index, count in ((0, 0), (1, 5), (3, 1)):
        reported = got[index].logprobs
        assert reported is not None
        assert reported.chosen == pytest.approx(float(expected[index, 8]), abs=1e-5)
        best = expected[index].argsort(descending=True)[:count].tolist()
        assert [token for token, _ in reported.top] == best
        assert [value for _, value in reported.top] == pytest.approx(expected[index, best].tolist(), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_what_the_cpu_draws():
    mixes: list[dict[str, Any]] = [
        {},
        {"top_k": 50},
        {"top_p": 0.9, "logprobs": 2},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3},
    ]
    rows = [make_row(temperature=i % 3 * 0.5, seed=i, output=[5, 6, 5], **mixes[i % 4]) for i in range(512)]
    logits = make_logits(512, 5000)
    assert tokens(logits.cuda(), rows) == tokens(logits, rows)
