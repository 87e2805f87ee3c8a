import pytest

from hypermlp.models import LanguageModel
from hypermlp_lab.training.recipe import byte_model, match_parameters, parameter_count


@pytest.mark.parametrize("shape", [(128, 3, 256), (64, 2, 128), (32, 1, 64), (96, 4, 512)])
def test_models_get_equal_parameter_counts_by_widening(shape):
    hidden_size, num_layers, seq_len = shape
    before = [
        byte_model(mixer, hidden_size=hidden_size, num_layers=num_layers, seq_len=seq_len)
        for mixer in ("hyperglu", "softmax")
    ]
    after = match_parameters(*before)
    counts = [parameter_count(config) for config in after]
    assert abs(counts[0] - counts[1]) <= 0.01 * max(counts)
    assert after[0] == before[0]
    assert after[1].intermediate_size > before[1].intermediate_size
    assert after[1].attention == before[1].attention


def test_meta_count_is_the_real_one():
    config = byte_model("hyperglu", hidden_size=16, num_layers=2, seq_len=32)
    assert parameter_count(config) == LanguageModel(config).num_parameters()


def test_any_models_can_be_matched():
    configs = [byte_model(mixer, hidden_size=128, num_layers=4, seq_len=8) for mixer in ("softmax", "R-c")]
    target = max(map(parameter_count, configs))
    assert all(abs(parameter_count(config) - target) < 0.01 * target for config in match_parameters(*configs))


def test_mixers_and_labels():
    options = {"hidden_size": 32, "num_layers": 1, "seq_len": 64}
    assert byte_model("hyperglu", **options).attention.max_lag == 64
    assert byte_model("hyperglu", max_lag=16, **options).attention.max_lag == 16
    softmax = byte_model("softmax", **options).attention
    assert softmax.rope
    assert softmax.conv_size == 4
    assert softmax.num_heads == 4
    assert softmax.max_lag is None
    assert byte_model("R-cg-q", **options).attention.mixer == "relu"
    with pytest.raises(ValueError, match="mamba"):
        byte_model("mamba", **options)
