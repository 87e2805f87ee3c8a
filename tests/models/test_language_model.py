import json

import pytest
import torch

from hypermlp import HyperConfig
from hypermlp.layers.block import TransformerBlock
from hypermlp.models import LanguageModel, LanguageModelConfig, next_token_loss


def tiny(label="G-cg-q-12o", **options):
    attention = HyperConfig.from_label(label, 16, **({"max_lag": 12} if "1" in label else {}))
    return LanguageModelConfig(11, 16, 2, attention, **{"intermediate_size": 24, **options})


def tokens(batch, length, seed=0):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))


LABELS = ["G-cg-q-12o", "R-cg-q-12o", "S-pc"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_and_that_every_parameter_learns(label, tied):
    torch.manual_seed(0)
    model = LanguageModel(tiny(label, tie_embeddings=tied))
    x = tokens(2, 9)
    logits = model(x[:, :-1])
    assert logits.shape == (2, 8, 11)
    model.loss(x[:, :-1], x[:, 1:]).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("label", LABELS)
def test_later_tokens_do_not_change_earlier_logits(label):
    torch.manual_seed(0)
    model = LanguageModel(tiny(label), backend="reference", dtype=torch.float64)
    x = tokens(2, 10)
    changed = x.clone()
    changed[:, 6] = (x[:, 6] + 1) % 11
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=0)
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("label", LABELS)
def test_mask_and_packing_reach_the_attention(label):
    torch.manual_seed(0)
    model = LanguageModel(tiny(label), dtype=torch.float64)
    first, second = tokens(1, 5, 1), tokens(1, 7, 2)
    alone = torch.cat((model(first), model(second)), 1)
    packed = model(torch.cat((first, second), 1), cu_seqlens=torch.tensor([0, 5, 12]))
    torch.testing.assert_close(packed, alone)
    padded = torch.cat((torch.full((1, 2), 3), first), 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(model(padded, mask)[:, 2:], model(first))
    assert not torch.allclose(model(padded)[:, 2:], model(first))


def test_the_tied_head_is_stored_once_and_counted_once():
    tied, untied = LanguageModel(tiny()), LanguageModel(tiny(tie_embeddings=False))
    assert untied.num_parameters() - tied.num_parameters() == 11 * 16
    assert "head.weight" in untied.state_dict()
    assert "head.weight" not in tied.state_dict()


def test_config_survives_json():
    for label in LABELS:
        config = tiny(label, context_length=8)
        assert LanguageModelConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_layers": -1}, "num_layers"),
        ({"hidden_size": 32}, r"attention\.hidden_size=16"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"context_length": 0}, "context_length"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_bad_configs(changes, message):
    fields = {"vocab_size": 11, "hidden_size": 16, "num_layers": 2, "attention": HyperConfig(16)}
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**{**fields, **changes})
    with pytest.raises(TypeError, match="num_layers must be a positive integer, got True"):
        LanguageModelConfig(**{**fields, "num_layers": True})
    with pytest.raises(TypeError, match="tie_embeddings must be True or False, got 'no'"):
        LanguageModelConfig(**fields, tie_embeddings="no")


def test_a_bidirectional_layer_is_refused():
    with pytest.raises(ValueError, match="causal"):
        LanguageModelConfig(11, 16, 2, HyperConfig(16, causal=False))
    with pytest.raises(TypeError, match="HyperConfig"):
        LanguageModelConfig(11, 16, 2, "S-pc")


def test_bad_inputs():
    model = LanguageModel(tiny())
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="targets"):
        next_token_loss(torch.zeros(2, 3, 11), torch.zeros(2, 4, dtype=torch.long))


def test_loss_leaves_out_ignored_targets():
    logits = torch.randn(1, 4, 11)
    targets = torch.tensor([[1, 2, -100, 3]])
    kept = [0, 1, 3]
    expected = -logits.log_softmax(-1)[0, kept, targets[0, kept]].mean()
    torch.testing.assert_close(next_token_loss(logits, targets), expected)


@pytest.mark.parametrize("label", LABELS)
def test_meta_construction_then_reset(label):
    model = LanguageModel(tiny(label), device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(tokens(1, 6)).isfinite().all()


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("width", [32, 128])
def test_a_deep_stack_starts_with_sane_scales(label, width):
    torch.manual_seed(0)
    depth = 12
    attention = HyperConfig.from_label(label, width, **({"max_lag": 64} if "1" in label else {}))
    blocks = [TransformerBlock(attention, 2 * width, num_layers=depth, layer_idx=i) for i in range(depth)]
    x = torch.randn(2, 64, width, requires_grad=True)
    scales, y = [], x
    for block in blocks:
        y = block(y)
        scales.append(y.square().mean().sqrt().item())
    # the sum of 2 * depth branches of variance at most about 1 / (2 * depth) each, on a stream of variance 1
    assert all(0.9 < scale < 2.5 for scale in scales), scales
    y.backward(torch.randn_like(y))
    assert 0.5 < x.grad.square().mean().sqrt() < 4
    norms = [block.attention.o_proj.weight.grad.norm().item() for block in blocks]
    assert max(norms) / min(norms) < 5, norms


def test_tokens_enter_the_stream_with_unit_variance():
    torch.manual_seed(0)
    for width in (32, 256):
        model = LanguageModel(LanguageModelConfig(256, width, 1, HyperConfig(width, max_lag=64)))
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model(torch.arange(256)[None])
        assert seen[0].square().mean().item() == pytest.approx(1, abs=0.1)
        # embeddings unlike its own say nothing yet: logits of unit size
        logits = model.norm(torch.randn(64, width)) @ model.embedding.weight.T
        assert logits.std().item() == pytest.approx(1, abs=0.1)
