"""Each recipe on a stand-in of ours with the trainer's names: it balances in place of the trainer's own update."""

import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="python3-torch is not installed")

from conftest import config  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))


class Gate(torch.nn.Module):
    """A router whose counts and bias have the names of a trainer."""

    def __init__(self, seed, counts, bias, dtype=torch.float32, none=False, experts=8, top_k=2):
        super().__init__()
        self.names, self.top_k, self.dtype = (counts, bias), top_k, dtype
        self.generator = torch.Generator().manual_seed(seed)
        if none:
            setattr(self, counts, None)
        elif counts:
            self.register_buffer(counts, torch.zeros(experts, dtype=dtype), persistent=False)
        self.register_buffer(bias, torch.zeros(experts))

    def choose(self, tokens=512):
        bias = getattr(self, self.names[1])
        scores = torch.rand(tokens, len(bias), generator=self.generator) - 0.1 * torch.arange(len(bias))
        return (scores + bias).topk(self.top_k).indices

    def forward(self):
        chosen = self.choose()
        load = torch.bincount(chosen.flatten(), minlength=8).to(self.dtype)
        counts = getattr(self, self.names[0])
        if counts is None:
            setattr(self, self.names[0], load)
        else:
            counts += load
        return chosen


class Model(torch.nn.Module):
    def __init__(self, **names):
        super().__init__()
        self.layers = torch.nn.ModuleList(Gate(seed, **names) for seed in (1, 2))
        for number, gate in enumerate(self.layers):
            gate.layer_number = 10 + number

    def forward(self):
        for gate in self.layers:
            gate()


def balances(balancer, batch):
    """`batch` runs one batch and all that the trainer calls after it."""
    ratios = []
    for _ in range(140):
        batch()
        ratios.append(balancer.controller.report().over_floor)
    assert sum(ratios[60:]) / 80 <= 1.15


def test_megatron():
    import megatron

    model, trainer = Model(counts="local_tokens_per_expert", bias="expert_bias"), types.SimpleNamespace()
    trainer._update_router_expert_bias = lambda *_: pytest.fail("the trainer's own update ran")
    balancer = megatron.balance([model], config(), trainer)

    def batch():
        model()
        trainer._update_router_expert_bias([model], None)
        balancer.step(loss=2.0, skipped=False)

    balances(balancer, batch)
    assert list(balancer.report()) == [10, 11]


def test_torchtitan():
    import torchtitan

    model = Model(counts="tokens_per_expert_E", bias="expert_bias_E")
    hooks = []
    optimizers = types.SimpleNamespace(register_step_pre_hook=hooks.append)
    balancer = torchtitan.balance(model, optimizers, config())
    for gate in model.layers:  # the model is initialised after the optimizers are built
        gate.expert_bias_E = torch.zeros(8)

    def batch():
        model()
        for hook in hooks:
            hook(optimizers, (), {})

    balances(balancer, batch)


def test_nemo_automodel():
    import nemo_automodel

    model = Model(counts="_cumulative_expert_load", bias="e_score_correction_bias", dtype=torch.int64, none=True)
    balancer = nemo_automodel.balance(model, config(aux_loss_weight={"policy": "fixed", "initial": 0.001}))
    balances(balancer, lambda: (model(), model.update_moe_gate_bias()))
    assert [gate.aux_loss_coeff for gate in model.layers] == [0.001, 0.001]


def test_olmo_core():
    import olmo_core

    model = Model(counts="score_bias_batch_size_per_expert", bias="score_bias")
    balancer = olmo_core.balance(model, config())
    balances(balancer, lambda: (model(), model.post_batch(dry_run=True), model.post_batch()))


class Experts(torch.nn.Module):
    def forward(self, hidden, indices, weights):
        return hidden


class Block(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.gate = Gate(seed, None, "e_score_correction_bias")
        self.experts = Experts()

    def forward(self):
        chosen = self.gate.choose()
        return self.experts(torch.zeros(len(chosen), 1), chosen, torch.ones(len(chosen), 2))


def test_huggingface():
    import huggingface

    model = torch.nn.Sequential(Block(1), Block(2))
    callback = huggingface.Balance(model, config(aux_loss_weight={"policy": "fixed", "initial": 0.002}),
                                   bias="e_score_correction_bias")

    def batch():
        for block in model:
            block()
        model.eval()
        model[0]()  # validation counts nothing
        model.train()
        callback.on_step_end(None, None, None, model=model)
        assert callback.balancer.controller.report().tokens == 512

    balances(callback.balancer, batch)
    assert model.router_aux_loss_coef == 0.002


def test_replayed_routes_are_held():
    import megatron
    import rl_replay

    model = Model(counts="local_tokens_per_expert", bias="expert_bias")
    balancer = megatron.balance([model], config(), types.SimpleNamespace())
    balances(balancer, lambda: (model(), balancer.step()))
    before = [gate.expert_bias.clone() for gate in model.layers]
    with rl_replay.replayed(balancer):
        for _ in range(20):
            for gate in model.layers:
                gate.local_tokens_per_expert += torch.tensor([1024.0] + [0.0] * 7)
            balancer.step()
    assert all(torch.equal(a, gate.expert_bias) for a, gate in zip(before, model.layers))
    model()
    balancer.step()
    assert any(not torch.equal(a, gate.expert_bias) for a, gate in zip(before, model.layers))
