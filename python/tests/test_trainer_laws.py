"""The update equations of trainers, written anew in float32 from their published form, in a closed loop.

Against sign_bias: every move has the same sign, and the biases agree to 1e-5 over 500 steps.

    Megatron-Core (get_updated_expert_bias)            b += u sign(mean(c) - c)
    torchtitan (register_moe_load_balancing_hook)      the same, with the mean taken out of each move
    OLMo-core (MoERouter.post_batch)                   the move in two steps: d = γ sign(mean(c) - c), b += d
    NeMo AutoModel (Gate.update_bias)                  into a float32 master copy, from which the bias is written
    DeepSeek-V3 (technical report, section 2.1.2)      overloaded: b -= γ; underloaded: b += γ

Against quantile_bias, form k3 (Kimi K3 technical report, appendix D): within one bin, equal in at least 99 % of moves."""

import pytest

torch = pytest.importorskip("torch", reason="python3-torch is not installed")

from conftest import config  # noqa: E402

import moectl  # noqa: E402

RATE = 1e-3
EXPERTS, TOP_K, TOKENS, STEPS = 16, 2, 512, 500
SLOPE = 0.02  # by which each expert's scores lie below those of the one before


def megatron(bias, counts):
    return bias + torch.sign(counts.sum() / counts.numel() - counts) * RATE


def torchtitan(bias, counts):
    move = RATE * torch.sign(counts.mean() - counts)
    return bias + (move - move.mean())


def olmo_core(bias, counts):
    delta = RATE * (counts.mean(dim=0, keepdim=True) - counts).sign()
    return bias.clone().add_(delta)


class Nemo:
    """With a bias in bfloat16, as the model's weights, which the router adds; the master copy is what moves."""

    def __init__(self):
        self.master = torch.zeros(EXPERTS)
        self.bias = torch.zeros(EXPERTS, dtype=torch.bfloat16)

    def __call__(self, bias, counts):
        assert torch.equal(bias, self.master)
        self.master = self.master + torch.sign(counts.mean() - counts) * RATE
        self.bias.copy_(self.master)
        return self.master


def deepseek_v3(bias, counts):
    fair = counts.sum() / len(counts)
    return torch.where(counts > fair, bias - RATE, torch.where(counts < fair, bias + RATE, bias))


@pytest.mark.parametrize("law", [megatron, torchtitan, olmo_core, Nemo(), deepseek_v3],
                         ids=["megatron", "torchtitan", "olmo_core", "nemo_automodel", "deepseek_v3"])
def test_the_published_update_and_sign_bias_move_alike(law):
    settings = config(layers=1, experts=EXPERTS, top_k=TOP_K, policy="sign_bias", safety={"responsiveness": False})
    settings["expert_bias"] = {"policy": "sign_bias", "options": {"step": RATE, "zero_mean_move": law is torchtitan},
                               "limits": {"min": -16, "max": 16, "rate": 0.01, "center": False}}
    controller = moectl.Controller(settings)
    generator = torch.Generator().manual_seed(3)
    bias = torch.zeros(EXPERTS)
    largest, moved, rested = 0.0, 0, 0
    for _ in range(STEPS):
        scores = torch.rand(TOKENS, EXPERTS, generator=generator) - SLOPE * torch.arange(EXPERTS)
        chosen = scores + (law.bias.float() if isinstance(law, Nemo) else bias)
        counts = torch.bincount(chosen.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
        before = torch.frombuffer(controller.bias(0), dtype=torch.float64)
        controller.record_counts(counts, layer=0)
        controller.step()
        after = torch.frombuffer(controller.bias(0), dtype=torch.float64)
        updated = law(bias, counts.float())
        signs = torch.sign((updated - bias).double().round(decimals=6))
        assert torch.equal(signs, torch.sign((after - before).round(decimals=6)))
        moved, rested = moved + int((signs != 0).sum()), rested + int((signs == 0).sum())
        bias = updated
        largest = max(largest, (bias.double() - after).abs().max().item())
    assert largest < 1e-5
    assert bias.abs().max() > 0.05
    assert moved > 7000 and rested > 50  # an expert at its share exactly does not move


BINS = 1000


def k3(bias, scores):
    """One update in float32, and the width of a bin. scores [T, N]: unbiased; bias [N]."""
    tokens, experts = scores.shape
    runner_up = (scores + bias).topk(TOP_K + 1).values[:, -1:]
    required = runner_up - scores  # the bias that would have put each expert at the edge of being chosen
    low, high = bias.min() - 1, bias.max() + 1
    width = (high - low) / BINS
    bins = ((required - low) / width).floor().long().clamp(0, BINS - 1)
    histogram = torch.stack([torch.bincount(column, minlength=BINS) for column in bins.T])
    wanted = TOP_K * tokens / experts
    cumulative = histogram.cumsum(1)
    first = (cumulative >= wanted).int().argmax(1)
    inside = histogram.gather(1, first[:, None])[:, 0]
    part = (wanted - (cumulative.gather(1, first[:, None])[:, 0] - inside)) / inside
    quantile = low + (first + part) * width
    return quantile - quantile.mean(), width.item()


def test_the_published_quantile_and_k3_move_alike():
    settings = config(layers=1, experts=EXPERTS, top_k=TOP_K, safety={"responsiveness": False})
    settings["expert_bias"] = {"policy": "quantile_bias", "options": {"form": "k3", "gain": 1.0},
                               "limits": {"min": -16, "max": 16, "rate": 16, "center": False}}
    controller = moectl.Controller(settings)
    generator = torch.Generator().manual_seed(4)
    bias = torch.zeros(EXPERTS)
    moves = equal = 0
    for _ in range(STEPS):
        scores = torch.rand(TOKENS, EXPERTS, generator=generator) * (1 - SLOPE * torch.arange(EXPERTS))
        biased = scores + bias
        top = biased.topk(TOP_K + 1)
        controller.record(0, top.indices[:, :TOP_K].contiguous(), top_values=top.values, biased_scores=biased)
        controller.step()
        updated, width = k3(bias, scores)
        after = torch.frombuffer(controller.bias(0), dtype=torch.float64)
        apart = (updated.double() - after).abs()
        assert apart.max() <= width
        moves, equal = moves + EXPERTS, equal + int((apart <= 1e-6).sum())
        # Both go on from the same bias: that of the controller in float32.
        bias = after.float()
    assert equal >= 0.99 * moves
    assert bias.max() - bias.min() > 0.1
