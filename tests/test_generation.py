import math
import threading

import numpy as np
import pytest
import torch

from hypermlp import HyperConfig
from hypermlp.generation import (
    apply_repetition_penalty,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    generate,
    sample,
    stream,
)
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.text import decode, encode


@pytest.fixture
def model():
    torch.manual_seed(0)
    attention = HyperConfig(16, max_lag=8)
    return LanguageModel(LanguageModelConfig(256, 16, 1, attention, intermediate_size=16, context_length=8))


def test_temperature_scales_logits():
    logits = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(apply_temperature(logits, 0.5), torch.tensor([[2.0, 4.0]]))
    with pytest.raises(ValueError, match="temperature"):
        apply_temperature(logits, -1.0)


@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 1e-45, 1e-300, 5e-324])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e30])
def test_a_temperature_near_zero_takes_the_likeliest(temperature, scale):
    logits = scale * torch.tensor([[1.0, 3.0, 2.0], [-7.0, -9.0, -8.0]])
    assert sample(logits, temperature=temperature).tolist() == [1, 0]
    assert sample(logits, temperature=temperature, top_k=2, top_p=0.9).tolist() == [1, 0]
    equals = scale * torch.tensor([2.0, 1.0, 2.0]).expand(1000, 3)
    drawn = sample(equals, temperature=temperature, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(drawn, minlength=3).tolist() == pytest.approx([500, 0, 500], abs=60)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("temperature", -1.0, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", math.inf, ValueError),
        ("temperature", "1", TypeError),
        ("temperature", False, TypeError),
        ("top_k", 0, ValueError),
        ("top_k", 2.5, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", math.nan, ValueError),
        ("top_p", True, TypeError),
        ("repetition_penalty", 0.0, ValueError),
        ("repetition_penalty", math.inf, ValueError),
        ("num_samples", True, TypeError),
        ("num_samples", 0, ValueError),
        ("seed", 2**64, ValueError),
        ("seed", 1.5, TypeError),
    ],
)
@pytest.mark.parametrize("new_tokens", [0, 2])
def test_options_are_checked_before_anything_is_drawn(model, option, value, error, new_tokens):
    with pytest.raises(error, match=option):
        stream(model, encode("ab"), new_tokens, **{option: value})


@pytest.mark.parametrize(("count", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)])
def test_numbers_of_tokens(model, count, error):
    with pytest.raises(error, match="max_new_tokens"):
        generate(model, encode("ab"), count)


def test_no_new_tokens_are_the_prompts(model):
    assert generate(model, encode("ab"), 0, num_samples=2).tolist() == [[97, 98]] * 2


def test_bytes_that_are_no_utf8_are_kept():
    raw = b"a\xff\xe4\xb8b"
    assert bytes(encode(raw.decode(errors="surrogateescape"))[0].tolist()) == raw  # as Python gives arguments
    with pytest.raises(UnicodeEncodeError):
        encode("\ud800")


def test_a_model_stays_in_evaluation_mode_until_the_last_has_ended(model):
    frozen = model.blocks[0].eval()
    first, second, third = (stream(model, encode("ab"), 3) for _ in range(3))
    next(first)
    next(second)
    assert not model.training
    list(first)
    assert not model.training  # the second goes on
    next(third)
    second.close()
    assert not model.training
    third.close()
    assert model.training
    assert not frozen.training
    assert not frozen.attention.training


def test_threads_leave_the_mode_as_it_was(model):
    seen = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(module.training))
    threads = [threading.Thread(target=generate, args=(model, encode("ab"), count)) for count in (3, 9, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.training
    assert len(seen) == 24
    assert not any(seen)


def test_top_k_keeps_exactly_k_even_of_equals():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    kept = apply_top_k(logits, 2)
    assert (kept > -torch.inf).sum(-1).tolist() == [2, 2]
    assert kept[0, 0] == 3.0
    torch.testing.assert_close(apply_top_k(logits, 100), logits)
    with pytest.raises(ValueError, match="top_k"):
        apply_top_k(logits, 0)


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()[None]
    for top_p, expected in [(0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.76, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (1e-9, [1])]:
        kept = apply_top_p(logits, top_p)[0] > -torch.inf
        assert kept.nonzero().flatten().tolist() == expected, top_p
    with pytest.raises(ValueError, match="top_p"):
        apply_top_p(logits, 0.0)


def test_sample_follows_the_distribution():
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(20_000, 3)
    drawn = sample(logits, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(share, torch.tensor([0.2, 0.3, 0.5]), atol=0.02, rtol=0)
    drawn = sample(logits, top_k=2, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(share, torch.tensor([0.0, 0.375, 0.625]), atol=0.02, rtol=0)
    assert sample(logits[:4], temperature=0).tolist() == [2, 2, 2, 2]


def test_generation_is_reproducible_and_keeps_the_prompt(model):
    prompt = encode("hello, world")
    first, again, other = (generate(model, prompt, 10, seed=seed) for seed in (3, 3, 4))
    assert first.shape == (1, 22)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert decode(first[0, :12]) == "hello, world"


def test_generation_does_not_touch_the_global_generator_or_the_mode(model):
    state = torch.get_rng_state()
    generate(model, encode("a"), 3)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def test_greedy_generation_without_cache_is_the_argmax_over_the_context(model):
    tokens = generate(model, encode("0123456789"), 3, temperature=0, use_cache=False)
    for end in (10, 11, 12):
        assert tokens[0, end] == model(tokens[:, end - 8 : end])[0, -1].argmax()


def test_nothing_to_add(model):
    assert decode(generate(model, encode("ab"), 0)[0]) == "ab"


def test_tokens_of_32_bits_are_continued_alike(model):
    options = {"seed": 3, "repetition_penalty": 1.3}
    prompts = encode("hello")
    for count in (0, 8):
        tokens = generate(model, prompts.int(), count, **options)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, generate(model, prompts, count, **options))


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="prompt_ids"):
        generate(model, encode(""), 3)
    with pytest.raises(ValueError, match=r"prompt_ids must be int64 or int32, got torch\.float32"):
        stream(model, encode("a").float(), 3)
    with pytest.raises(TypeError, match=r"write stop=\[\[5\]\]"):
        generate(model, encode("a"), 3, stop=[5])
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, encode("a"), -1)
    hidden = torch.tensor([[True, True, False, False]])
    for mask, error in ((torch.zeros(1, 4).masked_fill(hidden, -math.inf), TypeError), (1 + hidden.long(), ValueError)):
        with pytest.raises(error, match="attention_mask must"):
            generate(model, encode("abcd"), 3, attention_mask=mask)
    with pytest.raises(ValueError, match="a row without tokens"):
        generate(model, encode("ab"), 3, attention_mask=torch.zeros(1, 2).bool())


def test_a_temperature_of_half_precision(model):
    with np.errstate(all="raise"):
        found = generate(model, encode("ab"), 3, temperature=np.float16(0.5), seed=1)
    assert torch.equal(found, generate(model, encode("ab"), 3, temperature=0.5, seed=1))
    assert generate(model, encode("ab"), 3, temperature=10**30, repetition_penalty=10**30).shape == (1, 5)


@pytest.mark.parametrize("mixer", ["hyperglu", "softmax"])
@pytest.mark.parametrize("window", [8, 200])
def test_greedy_generation_with_cache_is_the_argmax_of_the_whole_run(mixer, window):
    attention = HyperConfig(16, mixer=mixer, max_lag=window)
    model = LanguageModel(LanguageModelConfig(256, 16, 2, attention, intermediate_size=16)).double()
    tokens = generate(model, encode("0123456789"), 20, temperature=0)
    expected = model(tokens).argmax(-1)
    assert torch.equal(tokens[:, 10:], expected[:, 9:-1])


def test_rows_of_different_lengths_generate_what_each_would_alone(model):
    prompts = [encode(text)[0] for text in ("abc", "a long prompt", "xy")]
    alone = [generate(model.double(), prompt[None], 12, temperature=0)[0, len(prompt) :] for prompt in prompts]
    for side in ("left", "right"):
        ids, mask = torch.full((3, 13), 7), torch.zeros(3, 13, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            where = slice(13 - len(prompt), None) if side == "left" else slice(0, len(prompt))
            ids[row, where], mask[row, where] = prompt, 1
        together = generate(model, ids, 12, temperature=0, attention_mask=mask)
        assert torch.equal(together[:, 13:], torch.stack(alone)), side


def test_a_model_without_windows_starts_again_from_half_its_context():
    attention = HyperConfig(16, mixer="softmax", rope=True)
    model = LanguageModel(LanguageModelConfig(256, 16, 1, attention, context_length=8)).double()
    tokens = generate(model, encode("01234567"), 6, temperature=0)[0]
    assert tokens[8] == model(tokens[None, :8])[0, -1].argmax()
    for end in (9, 10, 11, 12):  # the last four of nine, then up to eight
        assert tokens[end] == model(tokens[None, 5:end])[0, -1].argmax()


def end_of(sequence, tokens, start):
    """One past the first place at or after ``start`` where ``sequence`` ends."""
    ends = range(start + len(sequence), len(tokens) + 1)
    return next(end for end in ends if tokens[end - len(sequence) : end].tolist() == sequence)


def test_stop_sequences_end_rows_one_by_one(model):
    prompts = encode("ab").repeat(2, 1)
    free = generate(model, prompts, 30, seed=5)
    stop = free[0, 10:12].tolist()
    end = end_of(stop, free[0], 2)
    tokens = generate(model, prompts, 30, seed=5, stop=[stop], pad_token_id=255)
    assert torch.equal(tokens[0, :end], free[0, :end])
    assert (tokens[0, end:] == 255).all()


def test_generation_ends_when_every_row_has(model):
    free = generate(model, encode("ab"), 30, seed=5)[0]
    stop = free[10:12].tolist()
    tokens = generate(model, encode("ab"), 30, seed=5, stop=[stop])
    assert tokens.shape[1] == end_of(stop, free, 2)
    with pytest.raises(ValueError, match="stop"):
        generate(model, encode("a"), 3, stop=[[]])


def test_several_samples_of_a_prompt_differ_and_keep_it(model):
    tokens = generate(model, encode("hello"), 10, num_samples=3, seed=0)
    assert tokens.shape == (3, 15)
    assert all(decode(row[:5]) == "hello" for row in tokens)
    assert len({tuple(row.tolist()) for row in tokens}) == 3


def test_repetition_penalty():
    logits, seen = torch.tensor([[2.0, -1.0, 3.0]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(apply_repetition_penalty(logits, seen, 2.0), torch.tensor([[1.0, -2.0, 3.0]]))
    with pytest.raises(ValueError, match="repetition_penalty"):
        apply_repetition_penalty(logits, seen, 0.0)


def test_streaming_leaves_the_gradient_mode_alone_and_checks_at_once(model):
    steps = stream(model, encode("ab"), 3)
    next(steps)
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="num_samples"):
        stream(model, encode("ab"), 3, num_samples=0)
