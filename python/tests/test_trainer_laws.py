"""The update equations of trainers, written anew in float32 from their published form, against sign_bias: every move has
the same sign, and the biases agree to 1e-5 over 500 steps of a closed loop.

Megatron-Core (get_updated_expert_bias): b += u · sign(mean(c) - c). torchtitan: the same, with the mean taken out of
each move."""

import pytest

torch = pytest.importorskip("torch", reason="python3-torch is not installed")

from conftest import config  # noqa: E402

import moectl  # noqa: E402

RATE = 1e-3


def megatron(bias, counts):
    return bias + torch.sign(counts.sum() / counts.numel() - counts) * RATE


def torchtitan(bias, counts):
    move = RATE * torch.sign(counts.mean() - counts)
    return bias + (move - move.mean())


@pytest.mark.parametrize("law, zero_mean", [(megatron, False), (torchtitan, True)])
def test_the_published_update_and_sign_bias_move_alike(law, zero_mean):
    settings = config(layers=1, experts=16, top_k=2, policy="sign_bias", safety={"responsiveness": False})
    settings["expert_bias"] = {"policy": "sign_bias", "options": {"step": RATE, "zero_mean_move": zero_mean},
                               "limits": {"min": -16, "max": 16, "rate": 0.01, "center": False}}
    controller = moectl.Controller(settings)
    generator = torch.Generator().manual_seed(3)
    bias = torch.zeros(16)
    largest = 0.0
    for _ in range(500):
        scores = torch.rand(512, 16, generator=generator) - 0.02 * torch.arange(16)
        counts = torch.bincount((scores + bias).topk(2).indices.flatten(), minlength=16)
        before = torch.frombuffer(controller.bias(0), dtype=torch.float64)
        controller.record_counts(counts, layer=0)
        controller.step()
        after = torch.frombuffer(controller.bias(0), dtype=torch.float64)
        updated = law(bias, counts.float())
        assert torch.equal(torch.sign((updated - bias).double().round(decimals=6)),
                           torch.sign((after - before).round(decimals=6)))
        bias = updated
        largest = max(largest, (bias.double() - after).abs().max().item())
    assert largest < 1e-5
    assert bias.abs().max() > 0.05
