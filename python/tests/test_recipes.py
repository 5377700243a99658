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
        self.layers = torch.nn.ModuleDict({str(10 + seed): Gate(seed, **names) for seed in (1, 2)})

    def forward(self):
        for gate in self.layers.values():
            gate()


def balances(balancer, batch):
    """`batch` runs one batch and all that the trainer calls after it."""
    ratios = []
    for _ in range(140):
        batch()
        report = balancer.controller.report()
        assert report.tokens == 512
        ratios.append(report.over_floor)
    assert sum(ratios[60:]) / 80 <= 1.15


def megatron_gates():
    """Two layers of the decoder, one of multi-token prediction, and one that is frozen."""
    gates = [Gate(seed, counts="local_tokens_per_expert", bias="expert_bias") for seed in (1, 2, 3, 4)]
    for gate, number in zip(gates, (1, 2, 1, 3)):
        gate.layer_number, gate.config = number, types.SimpleNamespace(num_layers=4)
        gate.is_mtp_layer, gate.frozen_expert_bias = gate is gates[2], gate is gates[3]
    return gates


@pytest.fixture
def finalize_model_grads(monkeypatch):
    """Stands for Megatron's module, which a function of the same name hides in the package above it."""
    above, module = types.ModuleType("megatron.core.distributed"), types.ModuleType("finalize_model_grads")
    module._update_router_expert_bias = lambda *_: pytest.fail("the trainer's own update ran")
    above.finalize_model_grads = lambda model: module._update_router_expert_bias(model, None)
    for name, stands in {"megatron": types.ModuleType("megatron"), "megatron.core": types.ModuleType("megatron.core"),
                         above.__name__: above, f"{above.__name__}.finalize_model_grads": module}.items():
        monkeypatch.setitem(sys.modules, name, stands)
    return above.finalize_model_grads


def test_megatron(finalize_model_grads):
    import balance_megatron

    gates = megatron_gates()
    model = torch.nn.ModuleList(gates)
    balancer = balance_megatron.balance([model], config())

    def batch():
        for gate in gates:
            gate()
        finalize_model_grads([model])
        balancer.step(loss=2.0, skipped=False)

    balances(balancer, batch)
    assert list(balancer.report()) == [1, 2, 5]
    assert not gates[3].expert_bias.any()


def test_torchtitan():
    import balance_torchtitan

    parts = [Model(counts="tokens_per_expert_E", bias="expert_bias_E")]
    hooks = []
    optimizers = types.SimpleNamespace(register_step_pre_hook=hooks.append)
    balancer = balance_torchtitan.balance(parts, optimizers, config())
    for gate in parts[0].layers.values():  # the model is initialised after the optimizers are built
        gate.expert_bias_E = torch.zeros(8)

    def batch():
        parts[0]()
        for hook in hooks:
            assert hook(optimizers, (), {}) is None  # as torch.optim wants it

    balances(balancer, batch)
    assert list(balancer.report()) == [11, 12]


def test_nemo_automodel():
    import balance_nemo_automodel

    model = Model(counts="_cumulative_expert_load", bias="e_score_correction_bias", dtype=torch.int64, none=True)
    balancer = balance_nemo_automodel.balance(model, config(aux_loss_weight={"policy": "fixed", "initial": 0.001}))
    balances(balancer, lambda: (model(), model.update_moe_gate_bias()))
    assert [gate.aux_loss_coeff for gate in model.layers.values()] == [0.001, 0.001]


def test_olmo_core():
    import balance_olmo_core

    model = Model(counts="score_bias_batch_size_per_expert", bias="score_bias")
    for router in model.layers.values():
        router.lb_loss_weight = 0.01
    balancer = balance_olmo_core.balance(model, config())
    model()
    model.post_batch(dry_run=True)  # counts nothing
    balances(balancer, lambda: (model(), model.post_batch()))
    # A config without an auxiliary loss leaves the trainer's own.
    assert [router.lb_loss_weight for router in model.layers.values()] == [0.01, 0.01]


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
    import balance_huggingface

    model = torch.nn.Sequential(Block(1), Block(2))
    callback = balance_huggingface.Balance(model, config(aux_loss_weight={"policy": "fixed", "initial": 0.002}),
                                           bias="e_score_correction_bias")

    def batch():
        for block in model:
            block()
        model.eval()
        model[0]()  # validation counts nothing
        model.train()
        callback.on_step_end(None, None, None, model=model)

    balances(callback.balancer, batch)
    assert model.router_aux_loss_coef == 0.002


def test_replayed_routes_are_held(finalize_model_grads):
    import balance_megatron
    import rl_replay

    model = torch.nn.ModuleList(megatron_gates()[:2])
    balancer = balance_megatron.balance([model], config())
    balances(balancer, lambda: ([gate() for gate in model], balancer.step()))
    before = [gate.expert_bias.clone() for gate in model]
    with rl_replay.replayed(balancer):
        for _ in range(20):
            for gate in model:
                gate.local_tokens_per_expert += torch.tensor([1024.0] + [0.0] * 7)
            balancer.step()
    assert all(torch.equal(a, gate.expert_bias) for a, gate in zip(before, model))
    for gate in model:
        gate()
    balancer.step()
    assert any(not torch.equal(a, gate.expert_bias) for a, gate in zip(before, model))
