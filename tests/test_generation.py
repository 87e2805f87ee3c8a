import pytest
import torch

from hypermlp import HyperConfig
from hypermlp.generation import apply_temperature, apply_top_k, apply_top_p, decode, encode, generate, sample
from hypermlp.models import LanguageModel, LanguageModelConfig


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


def test_greedy_generation_is_the_argmax_over_the_window(model):
    tokens = generate(model, encode("0123456789"), 3, temperature=0)
    for end in (10, 11, 12):
        assert tokens[0, end] == model(tokens[:, end - 8 : end])[0, -1].argmax()


def test_nothing_to_add(model):
    assert decode(generate(model, encode("ab"), 0)[0]) == "ab"


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="prompt_ids"):
        generate(model, encode(""), 3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, encode("a"), -1)
