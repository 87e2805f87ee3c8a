"""A language model learns the same through the kernels as through the chunked path."""

import torch
from place import DEVICE, ON_GPU
from torch import Tensor

from hypermlp import HyperConfig
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.ops.attention import Backend

# the interpreter shows that the test itself works
STEPS, LENGTH, BATCH, WIDTH = (200, 256, 16, 128) if ON_GPU else (3, 24, 2, 16)


def batches() -> list[Tensor]:
    """Counting in steps that the first two tokens give away: something that attention can learn."""
    rng = torch.Generator().manual_seed(0)
    start, step = (torch.randint(1, 60, (STEPS, BATCH, 1), generator=rng) for _ in range(2))
    return list((start + step * torch.arange(LENGTH + 1)) % 61)


def losses(backend: Backend, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    config = LanguageModelConfig(64, WIDTH, 2, HyperConfig(WIDTH, 2, max_lag=LENGTH))
    model = LanguageModel(config, backend=backend, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    found = []
    for tokens in batches():
        tokens = tokens.to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        found.append(loss.detach().cpu())
    return torch.stack(found)


def test_the_loss_curve_is_that_of_the_chunked_path() -> None:
    triton, chunked = losses("triton"), losses("chunked")
    if not ON_GPU:
        torch.testing.assert_close(triton, chunked, rtol=1e-2, atol=0)
        return
    assert chunked[-20:].mean() < 0.5 * chunked[:5].mean(), "the task was not learned: the comparison says nothing"
    # noise is what another start does; the first steps have had no time to drift apart
    other = losses("chunked", seed=1)
    torch.testing.assert_close(triton[:10], chunked[:10], rtol=1e-2, atol=0)
    noise = (other[-50:].mean() - chunked[-50:].mean()).abs() + chunked[-50:].std()
    assert (triton[-50:].mean() - chunked[-50:].mean()).abs() <= noise
    assert triton.isfinite().all()
