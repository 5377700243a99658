import importlib
import math
import os
import pickle
import subprocess
import sys
import warnings

import pytest

torch = pytest.importorskip("torch", reason="python3-torch is not installed")

import torch.utils.checkpoint  # noqa: E402

from conftest import config  # noqa: E402

import moectl  # noqa: E402
from moectl.torch import Balancer  # noqa: E402


class Gate(torch.nn.Module):
    """A router that prefers low indices, counts its tokens and adds a bias to choose."""

    def __init__(self, experts=8, top_k=2, seed=1, counts=torch.float32):
        super().__init__()
        self.top_k = top_k
        self.generator = torch.Generator().manual_seed(seed)
        self.register_buffer("tokens_per_expert", torch.zeros(experts, dtype=counts), persistent=False)
        self.register_buffer("expert_bias", torch.zeros(experts))

    def choose(self, tokens):
        experts = self.expert_bias.numel()
        scores = torch.rand(tokens, experts, generator=self.generator) - 0.1 * torch.arange(experts)
        return (scores + self.expert_bias).topk(self.top_k).indices

    def forward(self, tokens=512):
        chosen = self.choose(tokens)
        self.tokens_per_expert += torch.bincount(chosen.flatten(), minlength=self.expert_bias.numel())
        return chosen


def gates(count=2, **kind):
    return [Gate(seed=s, **kind) for s in range(count)]


def mean_over_floor(balancer, sites, after=60, forward=None):
    """MaxVio over its floor, of the 80 steps after the first `after`."""
    ratios = []
    for _ in range(after + 80):
        for layer, site in enumerate(sites):
            forward(layer, site) if forward else site()
        ratios.append(balancer.step(loss=2.0).over_floor)
    return sum(ratios[after:]) / 80


@pytest.mark.parametrize("counts", [torch.float32, torch.int64])
@pytest.mark.parametrize("overlap", [False, True])
def test_counts_of_the_model_balance_it(counts, overlap):
    sites = gates(counts=counts)
    addresses = [site.expert_bias.data_ptr() for site in sites]
    balancer = Balancer(config(), sites, overlap=overlap)
    assert balancer.controller.config["model"].get("delay", 0) == (1 if overlap else 0)
    # Counts alone and one step late: the law goes half as fast.
    assert mean_over_floor(balancer, sites, after=90 if overlap else 60) <= 1.15
    assert [site.expert_bias.data_ptr() for site in sites] == addresses
    assert not any(site.tokens_per_expert.any() for site in sites)
    assert torch.allclose(sites[0].expert_bias.double(),
                          torch.frombuffer(balancer.controller.bias(0), dtype=torch.float64), atol=1e-6)


def test_the_mixture_of_the_next_batch_reaches_feed_forward():
    tagged = config(model={"domains": ["a", "b"]})
    tagged["expert_bias"]["options"] = {"feedforward": "tags"}
    sites = gates()
    balancer = Balancer(tagged, sites)
    for site in sites:
        site()
    balancer.step(next_mixture=torch.tensor([300, 212]))
    assert balancer.report()[0]["next_mixture"] == {"a": 300, "b": 212}
    balancer.step()
    assert "next_mixture" not in balancer.report()[0]
    with pytest.raises(ValueError, match="next_mixture: 3 values: must be 2"):
        balancer.step(next_mixture=[1, 2, 3])
    with pytest.raises(ValueError, match="not with overlap"):
        Balancer(config(model={"domains": ["a", "b"]}), gates(), overlap=True).step(next_mixture=[1, 2])


def test_indices_balance_a_router_without_counts():
    sites = gates()
    balancer = Balancer(config(), sites, counts=None)
    assert mean_over_floor(balancer, sites, forward=lambda l, s: balancer.record_indices(l, s.choose(512))) <= 1.15


def test_layers_and_experts_come_from_the_model():
    balancer = Balancer(config(layers=9, experts=64), gates(3), layer_ids=[10, 11, 17], top_k=1)
    model = balancer.controller.config["model"]
    assert (model["layers"], model["experts"], model["top_k"]) == (3, 8, 1)
    assert balancer.aux_loss_weight(17) == 0.0 and balancer.temperature(10) == 1.0
    with pytest.raises(ValueError, match="layer"):
        balancer.temperature(0)
    assert list(balancer.report()) == []


def test_counts_that_cannot_count_are_refused():
    for kind in (torch.bfloat16, torch.float16):
        sites = gates(counts=kind)
        with pytest.raises(ValueError, match="are not exact"):
            Balancer(config(), sites).step()
    sites = gates()
    balancer = Balancer(config(), sites)
    sites[1].tokens_per_expert[3] = float(1 << 24)
    with pytest.warns(UserWarning, match="2\\^24"):
        balancer.step()
    sites[1].tokens_per_expert[3] = float(1 << 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.step()  # said once
    with pytest.raises(ValueError, match="has no attribute load"):
        Balancer(config(), sites, counts="load").step()


def test_an_attribute_that_is_none_counts_nothing():
    sites = gates()
    balancer = Balancer(config(), sites, reset=lambda site: setattr(site, "tokens_per_expert", None))
    sites[0]()
    sites[1].tokens_per_expert = None
    assert [r["tokens"] for r in (balancer.step(), balancer)[1].report().values()] == [512, 0]
    assert sites[0].tokens_per_expert is None


def test_buffers_may_be_swapped():
    """Trainers re-create buffers and swap their storage: sites are looked up by name."""
    sites = gates()
    balancer = Balancer(config(), sites)
    for step in range(20):
        for site in sites:
            site()
            site.expert_bias = site.expert_bias.clone()
            site.tokens_per_expert = site.tokens_per_expert.clone()
            site.expert_bias.data = site.expert_bias.data.clone()
        assert not [n for n in balancer.step().notices if n["kind"] == "wiring"]
        assert sites[1].expert_bias.any()


def test_a_bias_that_something_else_changes_is_noticed():
    sites = gates()
    balancer = Balancer(config(), sites, layer_ids=[3, 4])
    for _ in range(3):
        for site in sites:
            site()
        balancer.step()
    sites[1].expert_bias = torch.zeros(8)  # re-created
    for site in sites:
        site()
    balancer.step()
    wiring = [n["text"] for n in balancer.report()[4].get("notices", []) if n["kind"] == "wiring"]
    assert len(wiring) == 1 and "changed by something else" in wiring[0]
    assert not [n for n in balancer.report()[3].get("notices", []) if n["kind"] == "wiring"]
    assert sites[1].expert_bias.any()  # written again


def test_a_router_that_keeps_a_tensor_of_before_is_noticed():
    """The bias that moves is a new buffer, which the router does not read: the load does not answer."""
    sites = gates()
    balancer = Balancer(config(), sites, layer_ids=[3, 4])
    sites[1].kept = sites[1].expert_bias
    sites[1].expert_bias = sites[1].expert_bias.clone()
    told = []
    for _ in range(150):
        sites[0]()
        moving, sites[1].expert_bias = sites[1].expert_bias, sites[1].kept
        sites[1]()
        sites[1].expert_bias = moving
        told += [(n["kind"], n["layer"]) for n in balancer.step().notices]
    assert told == [("unresponsive", 4)]
    records = balancer.report()
    assert "unresponsive" in records[4]["actuators"]["expert_bias"]["reasons"]
    assert "unresponsive" not in records[3]["actuators"]["expert_bias"]["reasons"]


def test_a_fixed_bias_is_left_alone():
    sites = gates()
    sites[0].expert_bias.fill_(0.25)
    balancer = Balancer(config(policy="fixed"), sites)
    sites[0]()
    balancer.step()
    assert (sites[0].expert_bias == 0.25).all()


def test_the_state_survives_torch_save(tmp_path):
    def run(balancer, sites, steps):
        for _ in range(steps):
            for site in sites:
                site()
            balancer.step(loss=torch.tensor(2.0))

    straight = gates()
    balancer = Balancer(config(), straight)
    run(balancer, straight, 30)
    resumed = gates()
    first = Balancer(config(), resumed)
    run(first, resumed, 10)
    torch.save({"moectl": first.state_dict(), "model": [s.state_dict() for s in resumed]}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt")
    again = gates()
    second = Balancer(config(), again)
    for site, old, state in zip(again, resumed, saved["model"]):
        site.load_state_dict(state)
        site.generator = old.generator
    second.load_state_dict(saved["moectl"])
    run(second, again, 20)
    assert second.state_dict() == balancer.state_dict()
    assert all(torch.equal(a.expert_bias, b.expert_bias) for a, b in zip(again, straight))
    assert pickle.loads(pickle.dumps(saved["moectl"])) == saved["moectl"]


def test_the_state_survives_another_split(tmp_path):
    sites = gates(4)
    whole = Balancer(config(), sites, layer_ids=[10, 11, 12, 13])
    for _ in range(10):
        for site in sites:
            site()
        whole.step()
    state = whole.state_dict()
    assert sorted(state) == ["layer.10", "layer.11", "layer.12", "layer.13"]
    stages = []
    for ids in ([10, 11, 12], [13]):
        own = gates(len(ids))
        stages.append(Balancer(config(), own, layer_ids=ids))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stages[-1].load_state_dict(state)
        assert all(torch.equal(a.expert_bias, sites[i - 10].expert_bias) for a, i in zip(own, ids))
    assert {**stages[0].state_dict(), **stages[1].state_dict()} == state
    own = gates(2)
    own[1].expert_bias[0] = 0.5
    other = Balancer(config(), own, layer_ids=[13, 14])
    with pytest.warns(UserWarning, match="layer 14: not in the state"):
        other.load_state_dict(state)
    assert torch.equal(own[0].expert_bias, sites[3].expert_bias) and own[1].expert_bias[0] == 0.5


def test_the_models_own_biases_are_adopted():
    sites = gates()
    sites[1].expert_bias.copy_(torch.tensor([0.3, -0.3, 0, 0, 0.1, -0.1, 0, 0]))
    before = sites[1].expert_bias.clone()
    balancer = Balancer(config(), sites)
    assert torch.equal(sites[1].expert_bias, before) and not sites[0].expert_bias.any()
    balancer.step()
    assert torch.allclose(sites[1].expert_bias, before)


def test_layers_may_differ_in_their_experts():
    sites = [Gate(experts=8, seed=1), Gate(experts=4, seed=2)]
    balancer = Balancer(config(), sites, layer_ids=[2, 5])
    assert mean_over_floor(balancer, sites) <= 1.15


def test_freezing_holds_a_layer():
    sites = gates()
    balancer = Balancer(config(), sites, layer_ids=[7, 8])
    balancer.freeze(8)
    for _ in range(5):
        for site in sites:
            site()
        balancer.step()
    assert sites[0].expert_bias.any() and not sites[1].expert_bias.any()
    assert "frozen" in balancer.report()[8]["actuators"]["expert_bias"]["reasons"]


def notices(report, kind):
    return [(notice["layer"], notice["text"]) for notice in report.notices if notice["kind"] == kind]


def counts_of(balancer):
    return {layer: record.get("counts") for layer, record in balancer.report(arrays=True).items()}


def reasons_of(balancer):
    return {layer: record["actuators"]["expert_bias"]["reasons"] for layer, record in balancer.report().items()}


def run(balancer, sites, steps=1):
    for _ in range(steps):
        for site in sites:
            site()
        report = balancer.step(loss=2.0)
    return report


# ---- Indices ----


def test_buffers_that_begin_in_inference_mode_serve_training():
    """Lightning validates before the first batch."""
    sites = gates()
    balancer = Balancer(config(), sites)
    with torch.inference_mode():
        balancer.record_values(0, z_loss=1.0)
        balancer.record_indices(0, sites[0].choose(8))
        balancer.record()
    balancer.record_values(0, z_loss=3.0)
    balancer.record_indices(0, sites[0].choose(64))
    balancer.step()
    assert sum(counts_of(balancer)[0]) == 128 and balancer.report()[0]["metrics"]["z_loss"] == 2


def test_an_index_counts_in_its_own_layer_or_nowhere():
    balancer = Balancer(config(), gates(), counts=None)
    balancer.record_indices(0, torch.tensor([[0, 1], [2, -1]]))
    balancer.record_indices(1, torch.tensor([[-1, -1], [7, 6]], dtype=torch.int32))
    report = balancer.step()
    assert counts_of(balancer) == {0: [1, 1, 1, 0, 0, 0, 0, 0], 1: [0, 0, 0, 0, 0, 0, 1, 1]}
    assert not notices(report, "invalid")
    for layer, wrong in ((0, 8), (1, 8), (0, -2), (1, 1 << 40)):
        balancer.record_indices(layer, torch.tensor([[0, wrong], [1, wrong]]))
        balancer.record_indices(1 - layer, torch.tensor([[0, 1], [0, 2]]))
        report = balancer.step()
        assert (layer, "2 ids of experts that do not exist") in notices(report, "invalid")
        assert {where for where, _ in notices(report, "invalid")} == {layer}
        assert reasons_of(balancer)[layer] == ["invalid"] and "invalid" not in reasons_of(balancer)[1 - layer]
        assert counts_of(balancer)[1 - layer] == [2, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("experts", [torch.rand(4, 2), torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.int64),
                                     torch.zeros(2, 4, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)],
                         ids=["weights", "bool", "other_k", "transposed", "odd"])
def test_what_cannot_be_experts_is_refused(experts):
    with pytest.raises(ValueError, match="experts: "):
        Balancer(config(), gates(), counts=None).record_indices(0, experts)
    if experts.dtype != torch.int64:
        with pytest.raises(ValueError, match="experts: .*: must be integers"):
            moectl.torch.router_losses(torch.zeros(4, 8), experts)


def test_losses_of_slots_that_are_not_routed():
    # Of the second token one choice: f = (2/3, 1/3), P = (1/2, 1/2), times 2.
    losses = moectl.torch.router_losses(torch.zeros(2, 2), torch.tensor([[0, 1], [0, -1]]))
    assert losses["balance_loss"].item() == pytest.approx(1)
    skewed = moectl.torch.router_losses(torch.tensor([[3.0, 1], [3, 1]]).log(), torch.tensor([[0], [-1]]))
    assert skewed["balance_loss"].item() == pytest.approx(1.5)
    for wrong in (2, -2):
        assert math.isnan(moectl.torch.router_losses(torch.zeros(1, 2), torch.tensor([[0, wrong]]))["balance_loss"].item())


def test_a_pass_without_gradients_counts_nothing():
    balancer = Balancer(config(), gates(), counts=None)
    experts = torch.tensor([[0, 1], [2, 3]])
    with torch.no_grad():
        balancer.record_indices(0, experts)
    balancer.step()
    assert balancer.report()[0]["tokens"] == 0
    balancer.record_indices(0, experts)
    balancer.step()
    assert balancer.report()[0]["tokens"] == 2


def test_a_micro_batch_counts_once():
    balancer = Balancer(config(), gates(), counts=None)
    experts = torch.tensor([[0, 1], [2, 3]])
    for _ in range(2):
        for micro_batch in (0, 1, 0):
            for layer in range(2):
                balancer.record_indices(layer, experts, micro_batch)
        balancer.step()
        assert [record["tokens"] for record in balancer.report().values()] == [4, 4]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_pass_counts_once(reentrant):
    balancer = Balancer(config(), gates(), counts=None)
    weight = torch.ones(8, requires_grad=True)

    def block(x):
        balancer.record_indices(0, x.topk(2).indices, micro_batch=None if reentrant else 0)
        return (x * weight).sum()

    torch.utils.checkpoint.checkpoint(block, torch.rand(16, 8, requires_grad=True), use_reentrant=reentrant).backward()
    balancer.step()
    assert weight.grad is not None and balancer.report()[0]["tokens"] == 16


# ---- Counts ----


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -4.0, 2.0 ** 60])
def test_counts_that_are_none_never_cancel(wrong):
    sites = gates()
    balancer = Balancer(config(), sites)
    run(balancer, sites, 3)
    before = [site.expert_bias.clone() for site in sites]
    for value in (wrong, -wrong if wrong == -4 else wrong):
        for site in sites:
            site.tokens_per_expert += 10
        sites[1].tokens_per_expert[3] = value
        balancer.record()
    report = balancer.step()
    invalid = [text for layer, text in notices(report, "invalid") if layer == 1]
    assert f"{1 if wrong == -4 else 2} counts that are negative, not finite or above 2^40" in invalid
    assert reasons_of(balancer)[1] == ["invalid"] and counts_of(balancer)[0] == [20] * 8
    assert torch.equal(sites[1].expert_bias, before[1])
    run(balancer, sites)
    assert "invalid" not in reasons_of(balancer)[1]


def test_a_callable_needs_a_reset():
    sites = gates()
    for site in sites:
        site.parts = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="reset: must be given with a callable"):
        Balancer(config(), sites, counts=lambda site: site.parts.sum(0))
    balancer = Balancer(config(), sites, counts=lambda site: site.parts.sum(0), reset=lambda site: site.parts.zero_())
    for _ in range(3):
        for site in sites:
            site.parts += 1
        balancer.step()
        assert [record["tokens"] for record in balancer.report().values()] == [8, 8]


@pytest.mark.parametrize("counts", ["tokens_per_expert", None])
def test_a_layer_that_never_counts_is_told_once(counts):
    sites = gates()
    balancer = Balancer(config(health={"dwell": 5}), sites, layer_ids=[3, 4], counts=counts)
    told = []
    for step in range(20):
        if counts:
            sites[0]()
            sites[1].tokens_per_expert += 0.4  # shares
        else:
            balancer.record_indices(3, sites[0].choose(64))
        told += [(step, *notice) for notice in notices(balancer.step(), "missing_input")]
    assert [(step, layer) for step, layer, _ in told] == [(5, 4)], told
    assert "no token was counted in 5 steps" in told[0][2] and (counts or "record_indices") in told[0][2]


def test_what_the_controller_records_itself_is_not_missed():
    sites = gates()
    balancer = Balancer(config(health={"dwell": 3}), sites, counts=None)
    for _ in range(8):
        for layer, site in enumerate(sites):
            balancer.controller.record(layer, site.choose(64))
        assert not notices(balancer.step(), "missing_input")


# ---- Which biases are written ----


class Hashed(torch.nn.Module):
    """A router without a bias."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.zeros(8))

    def forward(self):
        self.tokens_per_expert += 128


def test_a_group_moves_by_its_own_policy():
    fixed, moving = {"policy": "fixed"}, {"policy": "adaptive_bias"}
    base = {"version": 1, "model": {"experts": 8, "top_k": 2}}
    sites = gates()
    run(Balancer({**base, "layers": [{"ids": [0], "expert_bias": moving}, {"ids": [1]}], "expert_bias": fixed}, sites), sites, 3)
    assert sites[0].expert_bias.any() and not sites[1].expert_bias.any()
    for held in ({"expert_bias": fixed}, {"frozen": True}):
        settings = {**base, "layers": [{"ids": [0]}, {"ids": [1], **held}], "expert_bias": moving}
        sites = gates()
        balancer = Balancer(settings, sites)
        for step in range(3):
            sites[1].expert_bias += 0.25  # the trainer's own
            assert not notices(run(balancer, sites), "wiring")
        assert sites[0].expert_bias.any() and (sites[1].expert_bias == 0.75).all()
        hashed = [Gate(), Hashed()]
        balancer = Balancer(settings, hashed)
        if "frozen" in held:
            with pytest.raises(ValueError, match="layer 1: Hashed has no bias expert_bias"):
                balancer.freeze(1, False)
        assert run(balancer, hashed, 3).tokens == 512
    with pytest.raises(ValueError, match="layer 1: Hashed has no bias expert_bias"):
        Balancer({**base, "layers": [{"ids": [0]}, {"ids": [1]}], "expert_bias": moving}, [Gate(), Hashed()])


def test_the_timeline_says_which_biases_move():
    sites = gates()
    balancer = Balancer(config(policy="fixed", timeline=[
        {"from": 3, "expert_bias": {"policy": "adaptive_bias"}}, {"from": 6, "freeze": [1]},
        {"from": 9, "expert_bias": {"policy": "fixed"}, "thaw": [1]}]), sites)
    sites[0].expert_bias[0] = 0.5
    biases = []
    for step in range(12):
        report = run(balancer, sites)
        biases.append([site.expert_bias.clone() for site in sites])
        wiring = notices(report, "wiring")
        assert bool(wiring) == (step == 3) and all("goes on from there" in text for _, text in wiring), (step, wiring)
    assert biases[2][0].tolist() == [0.5] + [0] * 7 and not biases[2][1].any()
    moved = [[not torch.equal(a, b) for a, b in zip(before, after)] for before, after in zip(biases, biases[1:])]
    assert moved[2:5] == [[True, True]] * 3 and moved[5:8] == [[True, False]] * 3 and moved[8:] == [[False, False]] * 3
    # Went on from what the trainer had.
    assert biases[3][0][0] - biases[3][0][1:].max() > 0.3


def test_a_timeline_that_begins_to_move_needs_its_bias_at_once():
    with pytest.raises(ValueError, match="layer 1: Hashed has no bias"):
        Balancer(config(policy="fixed", timeline=[{"from": 3, "expert_bias": {"policy": "adaptive_bias"}}]), [Gate(), Hashed()])


def test_a_guard_moves_the_bias_under_a_fixed_policy():
    sites = gates()
    balancer = Balancer(config(policy="fixed", guard={"enabled": True}), sites)
    sites[0].expert_bias += 1
    assert notices(run(balancer, sites), "wiring")


@pytest.mark.parametrize("how", ["shadow", "off", "hold", "environment", "freeze"])
def test_what_moves_nothing_leaves_the_trainers_biases_alone(how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("MOECTL_HOLD", "1")
    sites = gates()
    balancer = Balancer(config(mode=how) if how in ("shadow", "off") else config(), sites)
    if how != "environment":
        run(balancer, sites, 2)
    if how == "hold":
        balancer.hold()
    if how == "freeze":
        balancer.freeze(0)
        balancer.freeze(1)
    own = [site.expert_bias.clone() for site in sites]
    for _ in range(4):
        for site, bias in zip(sites, own):
            bias += torch.arange(8) / 16
            site.expert_bias += torch.arange(8) / 16  # the trainer's update
        assert not run(balancer, sites).notices
        assert all(torch.equal(site.expert_bias, bias) for site, bias in zip(sites, own))
    if how in ("shadow", "off"):
        return
    balancer.hold(False)
    balancer.freeze(0, False)
    balancer.freeze(1, False)
    # Goes on from there.
    assert [layer for layer, text in notices(run(balancer, sites), "wiring") if "goes on from there" in text] == [0, 1]
    for site, bias in zip(sites, own):
        spread = site.expert_bias - bias
        assert site.expert_bias.any() and (spread - spread.mean()).abs().max() < 0.3


def test_a_hold_holds_and_ends():
    sites = gates()
    balancer = Balancer(config(), sites)
    run(balancer, sites, 2)
    before = sites[0].expert_bias.clone()
    balancer.hold()
    run(balancer, sites, 3)
    assert torch.equal(sites[0].expert_bias, before) and "host_hold" in reasons_of(balancer)[0]
    balancer.hold(False)
    assert not run(balancer, sites).notices
    assert not torch.equal(sites[0].expert_bias, before) and "host_hold" not in reasons_of(balancer)[0]


# ---- State ----


def test_a_state_of_other_experts_leaves_the_models_bias():
    small = gates()
    balancer = Balancer(config(), small)
    run(balancer, small, 5)
    large = gates(experts=16)
    large[0].expert_bias[3] = 0.25
    other = Balancer(config(), large)
    with pytest.warns(UserWarning, match="layer 0: 8 values, now 16; layer 1: 8 values, now 16"):
        other.load_state_dict(balancer.state_dict())
    assert large[0].expert_bias[3] == 0.25 and not large[1].expert_bias.any()


def test_a_state_of_different_steps_changes_nothing():
    sites = gates()
    balancer = Balancer(config(), sites)
    run(balancer, sites, 3)
    old = balancer.state_dict()
    run(balancer, sites)
    before, biases = balancer.state_dict(), [site.expert_bias.clone() for site in sites]
    with pytest.raises(moectl.StateError, match=r"different steps: layer\.0 of 4, layer\.1 of 3"):
        balancer.load_state_dict({"layer.0": before["layer.0"], "layer.1": old["layer.1"]})
    assert balancer.state_dict() == before and balancer.controller.steps == 4
    assert all(torch.equal(site.expert_bias, bias) for site, bias in zip(sites, biases))


def test_what_was_recorded_before_loading_is_forgotten():
    sites = gates()
    balancer = Balancer(config(), sites)
    state = balancer.state_dict()
    sites[0]()
    balancer.record()
    balancer.record_indices(1, sites[1].choose(64), micro_batch=0)
    balancer.record_values(1, z_loss=5.0)
    balancer.load_state_dict(state)
    balancer.record_indices(1, sites[1].choose(32), micro_batch=0)
    balancer.step()
    assert [record["tokens"] for record in balancer.report().values()] == [0, 32]
    assert balancer.report()[1]["metrics"]["z_loss"] is None


def test_frozen_layers_stay_so_after_loading():
    timeline = [{"from": 2, "freeze": [1]}]
    sites = gates()
    balancer = Balancer(config(timeline=timeline), sites)
    balancer.freeze(0)
    run(balancer, sites, 4)
    for thawed in (False, True):
        if thawed:
            balancer.freeze(0, False)
            balancer.freeze(1, False)
            run(balancer, sites)
        again = gates()
        other = Balancer(config(timeline=timeline), again)
        other.load_state_dict(balancer.state_dict())
        before = [site.expert_bias.clone() for site in again]
        run(other, again)
        assert ["frozen" in reasons for reasons in reasons_of(other).values()] == [not thawed] * 2
        assert [torch.equal(site.expert_bias, bias) for site, bias in zip(again, before)] == [not thawed] * 2


@pytest.mark.parametrize("missing", ["missing", "of other experts", "spoilt"])
def test_a_layer_that_is_not_loaded_is_frozen_by_the_timeline_of_the_loaded_step(missing):
    def frozen(timeline, host=None):
        sites = gates()
        balancer = Balancer(config(timeline=timeline), sites)
        if host is not None:
            balancer.freeze(1, host)
        return sites, balancer

    timeline = [{"from": 2, "freeze": [1]}]
    large = gates(experts=16)
    other_experts = Balancer(config(), large)
    run(other_experts, large, 4)
    for at, host in ((timeline, None), ([], None), ([], True)):
        sites, saved = frozen(timeline=at)
        run(saved, sites, 4)
        state = {"layer.0": saved.state_dict()["layer.0"]}
        if missing != "missing":
            state["layer.1"] = other_experts.state_dict()["layer.1"] if missing == "of other experts" else b"spoilt"
        sites, balancer = frozen(timeline=at, host=host)
        with pytest.warns(UserWarning, match="layer 1: "):
            balancer.load_state_dict(state)
        # What the trainer does to a frozen layer is left alone.
        own = [site.expert_bias.clone() for site in sites]
        sites[1].expert_bias += torch.arange(8) / 16
        kept = sites[1].expert_bias.clone()
        run(balancer, sites)
        # A state that fits in part says itself that the host did not freeze the layer.
        holds = bool(at) or (bool(host) and missing != "of other experts")
        assert ["frozen" in reasons for reasons in reasons_of(balancer).values()] == [False, holds]
        assert balancer.controller.frozen() == [False, holds]
        assert torch.equal(sites[1].expert_bias, kept) == holds and not torch.equal(sites[0].expert_bias, own[0])


@pytest.mark.parametrize("keep", ["everything", "what_fits"])
@pytest.mark.parametrize("how", ["load", "load_layer"])
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_the_controllers_own_load_says_what_is_frozen(keep, how, stop):
    def balancer_of(host):
        sites = gates(3)
        balancer = Balancer(config(layers=3, timeline=[{"from": 3, "freeze": [1]}]), sites)
        balancer.freeze(0, host)
        return sites, balancer

    sites, saved = balancer_of(True)
    if stop:
        run(saved, sites, stop)
    if stop == 4:
        saved.freeze(1, False)
    sites, balancer = balancer_of(False)
    balancer.freeze(2)
    if how == "load":
        balancer.controller.load(saved.controller.save(), keep)
    else:
        for layer in range(3):
            balancer.controller.load_layer(layer, saved.controller.save_layer(layer), keep)
    assert balancer.controller.frozen() == [True, stop == 3, False]
    run(balancer, sites)
    assert ["frozen" in reasons for reasons in reasons_of(balancer).values()] == [True, stop == 3, False]


@pytest.mark.parametrize("when", ["before the entry", "after it"])
def test_the_host_decides_after_an_entry_of_the_timeline_not_before(when):
    """A state of the step at which an entry holds is the state before that entry."""
    sites = gates()
    saved = Balancer(config(timeline=[{"from": 3, "freeze": [1]}]), sites)
    run(saved, sites, 3)
    sites = gates()
    balancer = Balancer(config(timeline=[{"from": 3, "freeze": [1]}]), sites)
    balancer.controller.load(saved.controller.save())
    if when == "after it":
        assert balancer.controller.frozen() == [False, True]
        run(balancer, sites)
    balancer.freeze(1, False)
    own = sites[1].expert_bias.clone()
    assert balancer.controller.frozen() == [False, when != "after it"]
    run(balancer, sites)
    assert ["frozen" in reasons for reasons in reasons_of(balancer).values()] == [False, when != "after it"]
    assert torch.equal(sites[1].expert_bias, own) == (when != "after it")


@pytest.mark.parametrize("load", ["load", "load_layer"])
def test_a_state_that_cannot_be_loaded_leaves_what_is_frozen(load):
    sites = gates()
    balancer = Balancer(config(), sites)
    balancer.freeze(0)
    arguments = [0] if load == "load_layer" else []
    for wrong, error in ((b"spoilt", moectl.StateError), ("text", moectl.ArgumentError)):
        with pytest.raises(error):
            getattr(balancer.controller, load)(*arguments, wrong)
        with pytest.raises(ValueError, match="keep: 'some'"):
            getattr(balancer.controller, load)(*arguments, balancer.controller.save(), "some")
    run(balancer, sites)
    assert balancer.controller.frozen() == [True, False]
    assert ["frozen" in reasons for reasons in reasons_of(balancer).values()] == [True, False]


def test_a_bias_outside_the_limits_changes_nothing():
    sites = gates()
    balancer = Balancer(config(timeline=[{"from": 2, "freeze": [1]}]), sites)
    run(balancer, sites, 4)
    state = balancer.state_dict()
    del state["layer.1"]
    again = gates()
    other = Balancer(config(timeline=[{"from": 2, "freeze": [1]}]), again)
    run(other, again)
    again[0]()
    before = other.state_dict()
    bias = again[0].expert_bias.clone()
    again[1].expert_bias[0] = 1e9
    with pytest.raises(moectl.ArgumentError, match="layer 1"):
        other.load_state_dict(state)
    assert other.state_dict() == before and other.controller.frozen() == [False, False]
    assert torch.equal(again[0].expert_bias, bias) and again[0].tokens_per_expert.any()


# ---- Arguments ----


def site_with(**attributes):
    site = Gate()
    for name, value in attributes.items():
        delattr(site, name)
        setattr(site, name, value)
    return site


GROUP_OF_16 = {"version": 1, "model": {"experts": 16, "top_k": 2}, "layers": [{"ids": [0]}],
               "expert_bias": {"policy": "adaptive_bias"}}


@pytest.mark.parametrize("call, words", [
    (lambda b: Balancer(config(), []), "sites: none: must be a module for each layer"),
    (lambda b: Balancer(config(), gates(), layer_ids=[1]), "layer_ids: 1 ids: must be one for each of the 2 sites"),
    (lambda b: Balancer(config(), gates(), layer_ids=[0, 1.5]), "layer_ids: 1.5: must be a whole number"),
    (lambda b: Balancer(config(), gates(), top_k=0), "top_k: 0: must be from 1"),
    (lambda b: Balancer(config(), gates(), layer_ids=[1, 1]), r"layer_ids: \[1, 1\]: must differ"),
    (lambda b: Balancer({**GROUP_OF_16, "model": {"experts": 8, "top_k": 2}}, [site_with(expert_bias=torch.zeros(9))]),
     "layer 0: expert_bias: 9 values: must be 8"),
    (lambda b: Balancer(config(), [site_with(tokens_per_expert=torch.zeros(9))]).step(), "layer 0: 9 counts: must be 8"),
    (lambda b: Balancer(GROUP_OF_16, gates(1)), "layer 0: expert_bias: 8 values: must be 16"),
    (lambda b: Balancer(config(), [Gate().to("meta")]), "layer 0: expert_bias: on the device meta"),
    (lambda b: Balancer(config(), [site_with(tokens_per_expert=[0] * 8)]).step(), "layer 0: tokens_per_expert: list: must be a tensor"),
    (lambda b: Balancer(config(), gates(1), counts=lambda site: [0] * 8, reset=print).step(), "layer 0: counts: list: must be a tensor"),
    (lambda b: b.step(loss="x"), "loss: str: must be a number or a tensor of one"),
    (lambda b: b.step(loss=10**400), "loss: int: must be a number or a tensor of one"),
    (lambda b: b.step(loss=torch.zeros(2)), "loss: 2 values: must be one"),
    (lambda b: b.step(gradient_norm=torch.zeros(3)), "gradient_norm: 3 values: must be one"),
    (lambda b: b.step(next_mixture="x"), "next_mixture: str"),
    (lambda b: b.record_values(0, z_loss="x"), "z_loss: str: must be a number"),
    (lambda b: b.freeze(1 << 32), "layer: 4294967296: must be one of"),
    (lambda b: b.aux_loss_weight(1 << 32), "layer: 4294967296: must be one of"),
    (lambda b: b.load_state_dict({"layer.0": "x"}), "state: layer.0: str: must be bytes"),
    (lambda b: b.load_state_dict(None), "state: NoneType: must be a dict"),
])
def test_a_wrong_argument_is_named(call, words):
    balancer = Balancer(config(), gates())
    with pytest.raises(ValueError, match=words):
        call(balancer)
    sites = balancer._sites
    assert run(balancer, sites).tokens == 512  # nothing is left of it


def test_ids_may_be_numbers_of_other_libraries():
    sites = gates()
    balancer = Balancer(config(), sites, layer_ids=torch.tensor([4, 7]), top_k=torch.tensor(1))
    assert list(balancer.state_dict()) == ["layer.4", "layer.7"] and balancer.controller.top_k(7) == 1
    assert run(balancer, sites).tokens == 1024


def test_a_warning_names_the_line_that_steps():
    sites = gates()
    balancer = Balancer(config(), sites)
    sites[0].tokens_per_expert[0] = 1 << 24
    with pytest.warns(UserWarning, match="counts in float32") as told:
        balancer.step()
    assert told[0].filename == __file__


def test_copies_from_the_host_wait_for_no_accelerator(monkeypatch):
    """What a step sends to a CUDA device goes by pinned memory, as a copy of its own."""
    made, given, empty = [], torch.arange(3), torch.empty

    class Pinned:
        def copy_(self, other):
            made.append(other)
            return self

        def to(self, device, non_blocking=False):
            return "sent", device, non_blocking

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, pin_memory=False, **how: Pinned() if pin_memory else empty(*shape, **how))
        sent = moectl.torch._to(given, torch.device("cuda"))
    assert sent == ("sent", torch.device("cuda"), True) and made[0] is given
    assert moectl.torch._to(given, torch.device("cpu")) is given
    for number in (3, 2.5, True, math.nan, torch.tensor(2.5), torch.tensor([[7]])):
        found = moectl.torch._number("loss", number, torch.device("cpu"))
        assert found.dtype == torch.float64 and found.shape == () and found.item() == pytest.approx(float(number), nan_ok=True)
        meta = moectl.torch._number("loss", number, torch.device("meta"))
        assert meta.device.type == "meta" and meta.dtype == torch.float64


WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = %r
from conftest import config
from test_torch import Gate
from moectl.torch import Balancer
rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks)
sites = [Gate(seed=10 * rank + s) for s in range(2)]
balancer = Balancer(config(), sites)
collectives, all_reduce = [], dist.all_reduce
dist.all_reduce = lambda tensor, **how: (collectives.append(tensor.dtype), all_reduce(tensor, **how))[1]
for step in range(40):
    for site in sites:
        site(256)
    report = balancer.step(loss=2.0 + rank, skipped=step == 5 and rank == 1)
assert collectives == [torch.int64] * 41, collectives  # one a step, and once whether ranks have the same layers
assert report.tokens == 256 * ranks, report.tokens
torch.save([balancer.state_dict(), [s.expert_bias for s in sites]], "%%s.%%d" %% (store, rank))
if rank:  # other layers than the rest
    other = Balancer(config(), sites[:1])
else:
    other = Balancer(config(), sites)
try:
    other.step()
    sys.exit("ranks with other layers were not noticed")
except Exception as error:
    assert "other layers" in str(error), error
"""


def run_ranks(program, ranks, folder, *arguments):
    """Runs a program on that many ranks, each given its rank, their number and the path of the store, which is returned."""
    here = os.path.dirname(os.path.abspath(__file__))
    store = str(folder / "store")
    command = [sys.executable, "-c", program % ([here, os.path.dirname(here)],)]
    workers = [subprocess.Popen([*command, str(rank), str(ranks), store, *arguments]) for rank in range(ranks)]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0] * ranks
    finally:
        for worker in workers:
            worker.kill()
    return store


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")
def test_ranks_agree_to_the_bit(ranks, tmp_path):
    store = run_ranks(WORKER, ranks, tmp_path)
    states = [torch.load(f"{store}.{rank}") for rank in range(ranks)]
    for state, biases in states[1:]:
        assert state == states[0][0]
        assert all(torch.equal(a, b) for a, b in zip(biases, states[0][1]))
    assert states[0][1][0].any()


@pytest.mark.parametrize("indices", [False, True])
def test_nothing_is_read_from_the_device_before_the_one_copy(indices):
    """On the device `meta`, which has no values: whatever asked for one would fail."""
    sites = gates()
    balancer = Balancer(config(), sites, counts=None if indices else "tokens_per_expert")
    for site in sites:
        site.to("meta")
    for layer in range(2):
        if indices:
            balancer.record_indices(layer, torch.zeros(64, 2, dtype=torch.int64, device="meta"))
    balancer.record()
    loss = torch.tensor(2.5, device="meta")
    payload = balancer._payload(loss, loss, False, balancer._mixture(None))
    assert payload.device.type == "meta" and payload.dtype == torch.int64
    assert payload.numel() == sum(balancer._parts().values())


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="this PyTorch has no torch.compile")
def test_recording_survives_compilation():
    balancer = Balancer(config(), gates(), counts=None)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def route(scores):
        chosen = scores.topk(2).indices
        balancer.record_indices(0, chosen)
        return scores * 2

    balancer.record_indices(0, torch.zeros(0, 2, dtype=torch.int64))  # makes the buffer
    route(torch.rand(128, 8))
    assert balancer.step() and balancer.report()[0]["tokens"] == 128


def test_router_values_of_a_weight():
    # Rows (1, 0), (0, 2): at right angles, singular values 2 and 1.
    apart = moectl.torch.router_values(torch.tensor([[1.0, 0], [0, 2]]))
    assert apart == {"router_condition": 2.0, "router_similarity": 0.0}
    # Rows that differ in length and sign alone cannot be told apart.
    alike = moectl.torch.router_values(torch.tensor([[1.0, 1], [-2, -2]]))
    assert alike["router_similarity"] == pytest.approx(1)
    assert alike["router_condition"] > 1e12
    assert "router_similarity" not in moectl.torch.router_values(torch.tensor([[1.0, 0]]))


def test_losses_of_a_router_by_hand():
    # Probabilities (¾, ¼) and (¼, ¾), and both tokens choose expert 0: f = (1, 0), P = (½, ½), and the loss is 2 · ½.
    logits = torch.tensor([[3.0, 1], [1, 3]]).log().requires_grad_()
    losses = moectl.torch.router_losses(logits, torch.tensor([[0], [0]]))
    assert losses["balance_loss"].item() == pytest.approx(1)
    assert losses["z_loss"].item() == pytest.approx(math.log(4) ** 2)
    losses["balance_loss"].backward()
    assert logits.grad[0, 0] > 0
    # Without the padding, 2 · ¾.
    masked = moectl.torch.router_losses(logits, torch.tensor([[0], [0]]), mask=torch.tensor([True, False]))
    assert masked["balance_loss"].item() == pytest.approx(1.5)
    # Sigmoids ½ and ¾ over their sum: (0.4, 0.6), of which the chosen one is 0.6.
    sigmoid = moectl.torch.router_losses(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1]]), scores="sigmoid")
    assert sigmoid["balance_loss"].item() == pytest.approx(1.2)
    for wrong in (dict(mask=torch.ones(3)), dict(scores="tanh")):
        with pytest.raises(ValueError):
            moectl.torch.router_losses(logits, torch.tensor([[0], [0]]), **wrong)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("mask", [False, True])
def test_losses_without_tokens_are_zero(shape, mask):
    logits = torch.zeros(*shape, 4, requires_grad=True)
    losses = moectl.torch.router_losses(logits, torch.zeros(*shape, 2, dtype=torch.int64), torch.ones(shape) if mask else None)
    assert {name: loss.item() for name, loss in losses.items()} == {"balance_loss": 0, "z_loss": 0}
    sum(losses.values()).backward()
    assert logits.grad.shape == logits.shape
    with pytest.raises(ValueError, match="must be logits"):
        moectl.torch.router_losses(logits, torch.zeros(3, 2, dtype=torch.int64))


def test_gradient_ratios_leave_the_gradients_alone():
    weights = [torch.ones(3, 2, requires_grad=grad) for grad in (True, True, True, False)]
    balance = 0.1 * weights[0].sum() + weights[2].sum()
    task = 0.5 * weights[0].sum() + 2 * weights[1].sum()
    ratios = [one["gradient_ratio"].item() for one in moectl.torch.gradient_ratios(weights, balance, task)]
    assert ratios[:3] == pytest.approx([0.2, 0, math.inf]) and math.isnan(ratios[3])
    assert all(weight.grad is None for weight in weights)
    (balance + task).backward()
    assert weights[0].grad[0, 0].item() == pytest.approx(0.6)
    assert math.isnan(moectl.torch.gradient_ratios([torch.ones(2, requires_grad=True)], 1.0, task)[0]["gradient_ratio"])


@pytest.mark.parametrize("overlap", [False, True])
def test_recorded_values_are_metrics_and_absent_where_none_came(overlap):
    sites = gates()
    balancer = Balancer(config(), sites, layer_ids=[4, 9], overlap=overlap)
    lines = []
    balancer.set_log(lines.append)
    nine = {**moectl.torch.expert_output_norm(torch.tensor([[3.0, 4], [0, 1]])), **moectl.torch.router_values(torch.eye(8)),
            **moectl.torch.router_losses(torch.zeros(4, 8), torch.arange(8).view(4, 2)),
            **moectl.torch.gradient_ratios([sites[0].expert_bias], 0.0, torch.zeros(()))[0]}
    balancer.record_values(9, **nine)
    balancer.record_values(9, gradient_ratio=0.25)
    balancer.record_values(4, router_condition=math.inf, expert_output_norm=-1.0)
    with pytest.raises(ValueError, match="router_conditon"):
        balancer.record_values(4, router_conditon=1.0)
    records = []
    for _ in range(3):
        for site in sites:
            site()
        balancer.step()
        records.append({layer: record["metrics"] for layer, record in balancer.report().items()})
    at = int(overlap)
    known = {name: records[at][9][name] for name in (*nine, "gradient_ratio")}
    assert known == pytest.approx({"expert_output_norm": 3, "router_condition": 1, "router_similarity": 0, "balance_loss": 1,
                                   "z_loss": math.log(8) ** 2, "gradient_ratio": 0.25})
    assert records[at][4]["router_condition"] == 2 ** 24 and records[at][4]["expert_output_norm"] is None
    assert all(records[at + 1][layer][name] is None for layer in (4, 9) for name in known)
    text = "".join(line if isinstance(line, str) else line.decode() for line in lines)
    assert '"expert_output_norm":3' in text


VALUES = """
import sys, torch, torch.distributed as dist
sys.path[:0] = %r
from conftest import config
from test_torch import Gate
from moectl.torch import Balancer
rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks)
sites = [Gate(seed=layer) for layer in range(2)]
balancer = Balancer(config(), sites)
for site in sites:
    site()
balancer.record_values(0, z_loss=torch.tensor(1.0 + rank), router_condition=5)
if rank == 1:
    balancer.record_values(0, gradient_ratio=0.5)
balancer.step()
metrics = balancer.report()[0]["metrics"]
assert metrics["z_loss"] == 1.5 and metrics["router_condition"] == 5 and metrics["gradient_ratio"] == 0.5, metrics
assert balancer.report()[1]["metrics"]["z_loss"] is None
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")
def test_recorded_values_are_means_over_ranks(tmp_path):
    run_ranks(VALUES, 2, tmp_path)


DIFFERENT = """
import os, sys, warnings, torch, torch.distributed as dist
sys.path[:0] = %r
import moectl
from conftest import config
from test_torch import Gate, counts_of, gates, notices, reasons_of, run
from moectl.torch import Balancer
rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks)


def same(sites):
    mine = torch.cat([site.expert_bias for site in sites])
    all_ = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(all_, mine)
    return all(torch.equal(mine, other) for other in all_)


def refused(balancer, words):
    before = [site.expert_bias.clone() for site in balancer._sites]
    try:
        balancer.step()
    except moectl.ReductionError as error:
        assert words in str(error), error
        assert all(torch.equal(site.expert_bias, bias) for site, bias in zip(balancer._sites, before))
    else:
        sys.exit("not noticed: " + words)


for overlap in (False, True):
    for how in ("call", "environment"):
        # One rank holds, and so do all.
        os.environ["MOECTL_HOLD"] = "1" if how == "environment" and rank else "0"
        sites = [Gate(seed=10 * rank + s) for s in range(2)]
        balancer = Balancer(config(), sites, overlap=overlap)
        if how == "call":
            run(balancer, sites, 3)
            assert sites[0].expert_bias.any()
            if rank:
                balancer.hold()
        told = []
        for step in range(4):
            told += notices(run(balancer, sites), "hold")
            assert same(sites), step
        assert told == [(None, "1 of 2 ranks are held by hold() or by MOECTL_HOLD in their environment: all ranks hold")], told
        assert reasons_of(balancer)[0] == ["host_hold"], reasons_of(balancer)
        before = sites[0].expert_bias.clone()
        if rank:
            balancer.hold(False)
        run(balancer, sites, 3)
        assert same(sites) and not torch.equal(sites[0].expert_bias, before)
os.environ["MOECTL_HOLD"] = "0"

sites = gates()
balancer = Balancer(config(), sites)
run(balancer, sites, 5)
state, biases = balancer.state_dict(), [site.expert_bias.clone() for site in sites]
if rank:
    balancer.freeze(0)
refused(balancer, "layer 0: frozen on 1 of 2 ranks")
balancer.freeze(0)
assert run(balancer, sites).tokens == 512 * 2 and same(sites)  # what was counted until now is not lost

# With overlap a step later, and only for as long as they differ.
sites = gates()
balancer = Balancer(config(), sites, overlap=True)
run(balancer, sites, 3)
whole = balancer.controller.save()
if rank:
    balancer.freeze(0)
run(balancer, sites)
refused(balancer, "layer 0: frozen on 1 of 2 ranks")
balancer.controller.load(whole)
run(balancer, sites, 3)
assert balancer.controller.report().tokens == 512 * 2 and same(sites)

# A state on one rank alone.
sites = gates()
balancer = Balancer(config(), sites)
if rank:
    balancer.load_state_dict(state)
refused(balancer, "they are at other steps; layers 0, 1: other biases")

# Biases in one rank's model, as before DistributedDataParallel copies those of rank 0 to all.
sites = gates()
if rank == 0:
    sites[1].expert_bias.copy_(biases[1])
refused(Balancer(config(), sites), "ranks differ: layers 1: other biases")

# Bad counts of one rank are not made good by another's.
sites = gates()
balancer = Balancer(config(), sites)
for site in sites:
    site.tokens_per_expert += 10
    if rank:
        site.tokens_per_expert[3] = -4
report = balancer.step()
assert [layer for layer, text in notices(report, "invalid") if "1 counts that are negative" in text] == [0, 1], report.notices
assert reasons_of(balancer) == {0: ["invalid"], 1: ["invalid"]} and same(sites)

# Norms are means, so that policies that read them do the same on all ranks.
given, step = [], balancer.controller.step
balancer.controller.step = lambda **info: (given.append(info), step(**info))[1]
balancer.step(gradient_norm=1.0 + rank)
assert given[0]["gradient_norm"] == 1.5, given
dist.barrier()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")
def test_ranks_hold_together_and_differences_are_named(tmp_path):
    run_ranks(DIFFERENT, 2, tmp_path)


DDP = """
import sys, torch, torch.distributed as dist
sys.path[:0] = %r
from conftest import config
from test_torch import Gate, counts_of
from moectl.torch import Balancer
rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.weight = Gate(seed=rank), torch.nn.Parameter(torch.ones(()))

    def forward(self, tokens):
        self.chosen = self.gate(tokens)
        return self.weight * tokens


# Two micro-batches a step: with broadcast_buffers=False, or taking the counts after each, none is lost.
for broadcast in (False, True):
    model = Model()
    balancer = Balancer(config(layers=1), [model.gate])
    parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
    counted = torch.zeros(8, dtype=torch.int64)
    for _ in range(2):
        parallel(64).backward()
        counted += torch.bincount(model.chosen.flatten(), minlength=8)
        if broadcast:
            balancer.record()
    balancer.step()
    dist.all_reduce(counted)
    assert counts_of(balancer)[0] == counted.tolist(), (broadcast, counts_of(balancer), counted)
dist.barrier()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")
def test_micro_batches_under_data_parallel_are_all_counted(tmp_path):
    run_ranks(DDP, 2, tmp_path)


SHARDED = """
import sys, torch, torch.distributed as dist
sys.path[:0] = %r
import stand_in
from conftest import config
from moectl.torch import Balancer
rank, ranks, store, real = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "DTensor"
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks)
if real:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    kinds = {"replicate": Replicate(), "partial": Partial(), "shard": Shard(0)}
    make = lambda local, kind: DTensor.from_local(local, mesh, [kinds[kind]])
else:
    stand_in.install()
    make = stand_in.DTensor
whole = torch.arange(8, dtype=torch.float32) * 2 + 1  # 64, of all ranks together
mine = whole.chunk(ranks)[rank]
apart = torch.full((8,), float(rank)) + torch.arange(8) %% 2


class Site(torch.nn.Module):
    def __init__(self, counts, bias):
        super().__init__()
        self.tokens_per_expert, self.expert_bias = counts, bias


sites = [Site(make(whole.clone(), "replicate"), make(torch.zeros(8), "replicate")),
         Site(make(mine.clone(), "shard"), make(torch.zeros(8 // ranks), "shard")),
         Site(make(apart.clone(), "partial"), torch.zeros(8)),
         Site(apart.clone(), make(torch.zeros(8), "replicate"))]
balancer = Balancer(config(layers=4, policy="sign_bias"), sites)
balancer.step()
counted = [torch.tensor(record["counts"]) for record in balancer.report(arrays=True).values()]
added = sum(torch.full((8,), float(r)) + torch.arange(8) %% 2 for r in range(ranks))
for got, wanted in zip(counted, (whole, whole, added, added)):
    assert got.tolist() == wanted.tolist(), (got, wanted)
biases = torch.frombuffer(balancer.controller.biases(), dtype=torch.float64).float().view(4, 8)
assert biases.any(dim=1).all()
for site, bias in zip(sites, biases):
    own = site.expert_bias
    assert torch.equal(own.full_tensor() if hasattr(own, "full_tensor") else own, bias)
    counts = site.tokens_per_expert
    assert not (counts.to_local() if hasattr(counts, "to_local") else counts).any()
balancer.step()
assert not [n for r in balancer.report().values() for n in r.get("notices", []) if n["kind"] == "wiring"]

if real and ranks == 4:
    # Two dimensions, and groups that hold one of them: each group has all that lies along the other.
    square = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    site = Site(DTensor.from_local(apart, square, [Partial(), Partial()]), torch.zeros(8))
    for group in (None, square["data"].get_group(), square["tensor"].get_group()):
        site.tokens_per_expert = DTensor.from_local(apart.clone(), square, [Partial(), Partial()])
        balancer = Balancer(config(layers=1), [site], group=group)
        balancer.step()
        assert balancer.report(arrays=True)[0]["counts"] == added.tolist()
        site.tokens_per_expert = DTensor.from_local(whole.clone(), square, [Replicate(), Replicate()])
        balancer.step()
        assert balancer.report(arrays=True)[0]["counts"] == whole.tolist()
    three = dist.new_group([0, 1, 2])
    site.tokens_per_expert = DTensor.from_local(apart.clone(), mesh, [Partial()])
    if rank < 3:
        try:
            Balancer(config(layers=1), [site], group=three).record()
            sys.exit("a group that holds a part of the mesh was not noticed")
        except ValueError as error:
            assert "must hold all of them or one" in str(error), error
dist.barrier()
"""


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["DTensor", "stand-in"])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")
def test_a_dtensor_is_counted_once(kind, ranks, tmp_path):
    if kind == "DTensor" and not hasattr(torch.distributed, "tensor"):
        try:
            importlib.import_module("torch.distributed.tensor")
        except ImportError:
            pytest.skip("this PyTorch has no torch.distributed.tensor")
    run_ranks(SHARDED, ranks, tmp_path, kind)


def test_the_state_has_the_shape_that_checkpoints_need():
    """Flat, the same keys at each step, and bytes: distributed checkpoints fill tensors in place, which a state whose size
    grows with its history would not fit; bytes they replace."""
    sites = gates()
    balancer = Balancer(config(), sites, layer_ids=[4, 9])
    keys = []
    for _ in range(3):
        state = balancer.state_dict()
        keys.append(list(state))
        assert all(type(value) is bytes for value in state.values())
        for site in sites:
            site()
        balancer.step()
    assert keys == [["layer.4", "layer.9"]] * 3


CHECKPOINT = """
import sys, torch, torch.distributed as dist
sys.path[:0] = %r
import torch.distributed.checkpoint as dcp
from conftest import config
from test_torch import Gate
from moectl.torch import Balancer
rank, ranks, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks)
groups = [dist.new_group([r]) for r in range(ranks)]  # each rank a pipeline stage
first = [[10, 11, 12], [13]][rank]
sites = [Gate(seed=layer) for layer in first]
balancer = Balancer(config(), sites, layer_ids=first, group=groups[rank])
for _ in range(10):
    for site in sites:
        site(256)
    balancer.step()
dcp.save({"moectl": balancer.state_dict()}, checkpoint_id=folder)
everywhere = [None] * ranks
dist.all_gather_object(everywhere, balancer.state_dict())
saved = {**everywhere[0], **everywhere[1]}
second = [[10, 11], [12, 13]][rank]
sites = [Gate(seed=layer) for layer in second]
other = Balancer(config(), sites, layer_ids=second, group=groups[rank])
state = {"moectl": other.state_dict()}
dcp.load(state, checkpoint_id=folder)
other.load_state_dict(state["moectl"])
assert other.state_dict() == {key: saved[key] for key in other.state_dict()}
assert all(site.expert_bias.any() for site in sites)
"""


def test_the_state_survives_a_distributed_checkpoint_and_another_split(tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint", reason="this PyTorch has no distributed checkpoints")
    if not hasattr(checkpoint, "save"):
        pytest.skip("this PyTorch is older than the checkpoints that take any value")
    run_ranks(CHECKPOINT, 2, tmp_path, str(tmp_path / "checkpoint"))
