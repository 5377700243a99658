"""Each recipe on the router of the real trainer, on the CPU, in place of the trainer's own update; and that update beside
`sign_bias`.

MOECTL_TRAINERS names a folder with checkouts `megatron-lm`, `torchtitan`, `olmo-core` and `automodel`; a test whose
checkout is missing is skipped. transformers is taken from where Python finds it. These versions ran, with Debian's torch
2.6 (trixie) and 2.14 (forky):

    Megatron-Core    0.20.0, commit d98e8a6 of 2026-08-22
    torchtitan       commit b5bcd76 of 2026-08-21
    OLMo-core        2.5.0, commit fa6c501 of 2026-06-22
    NeMo AutoModel   0.5.0, commit 36044ad of 2026-08-22
    transformers     5.12.1, forky alone, with accelerate 1.14.0

The trainers import much that a router does not need. What cannot be imported is replaced by an empty module; routers,
counts, biases and updates are always the trainer's own."""

import importlib
import importlib.abc
import importlib.util
import os
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest

torch = pytest.importorskip("torch", reason="python3-torch is not installed")

from conftest import config  # noqa: E402

import moectl  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

EXPERTS, TOP_K, WIDTH, TOKENS, RATE = 8, 2, 16, 512, 1e-3


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules for the names given and all below them."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in self.names):
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


class Empty(types.ModuleType):
    """Any name of it is an empty class, or a mock where the name is not that of a class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {}) if name[:1].isupper() else MagicMock(name=name)
        setattr(self, name, value)
        return value


@contextmanager
def checkout(name, *, bare=(), absent=()):
    """Makes the trainer's modules importable. bare: packages whose own __init__ does not run, their modules do.
    absent: modules that are empty."""
    if not os.environ.get("MOECTL_TRAINERS"):
        pytest.skip("MOECTL_TRAINERS names no folder with checkouts of the trainers")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        pytest.skip(f"torch {torch.__version__}: the trainers need 2.6 or later")
    root = Path(os.environ["MOECTL_TRAINERS"]) / name
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    before, finder = set(sys.modules), Absent(absent)
    sys.path.insert(0, str(root))
    sys.meta_path.insert(0, finder)
    try:
        for package in bare:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(root.joinpath(*package.split(".")))]
        yield importlib.import_module
    finally:
        sys.path.remove(str(root))
        sys.meta_path.remove(finder)
        names = {package.split(".")[0] for package in (*bare, *absent)}
        for module in set(sys.modules) - before:
            if module.split(".")[0] in names:
                del sys.modules[module]


def skewed(weight):
    """Experts score the lower, the higher their index: the first value of each token is 1."""
    with torch.no_grad():
        weight.copy_(0.25 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
        weight[:, 0] = -0.5 * torch.arange(len(weight))


class Tokens:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self):
        tokens = torch.randn(TOKENS, WIDTH, generator=self.generator)
        tokens[:, 0] = 1
        return tokens


def balances(balancer, batch, biases, steps=140):
    """`batch` runs one batch and all that the trainer calls after it; `biases` are the trainer's own tensors."""
    addresses, ratios = [bias.data_ptr() for bias in biases()], []
    for _ in range(steps):
        batch()
        assert all(sum(record["counts"]) == TOKENS * TOP_K for record in balancer.report(arrays=True).values())
        ratios.append(balancer.controller.report().over_floor)
    assert ratios[0] > 5
    assert sum(ratios[60:]) / (steps - 60) <= 1.15
    assert [bias.data_ptr() for bias in biases()] == addresses
    for bias, layer in zip(biases(), balancer.controller.layers):
        given = torch.frombuffer(balancer.controller.bias(layer), dtype=torch.float64)
        assert bias.dtype == torch.float32 and torch.allclose(bias.double(), given, atol=1e-6)


def moves_as_sign_bias(batch, counts, update, bias, zero_mean=False):
    """The trainer's own update, closed around its own router, beside sign_bias on the same counts."""
    settings = config(layers=1, policy="sign_bias", safety={"responsiveness": False})
    settings["expert_bias"].update(options={"step": RATE, "zero_mean_move": zero_mean},
                                   limits={"min": -16, "max": 16, "rate": 0.01, "center": False})
    controller, largest = moectl.Controller(settings), 0.0
    for _ in range(300):
        batch()
        before, ours = bias().double(), torch.frombuffer(controller.biases(), dtype=torch.float64)
        controller.record_counts(counts().long(), layer=0)
        controller.step()
        update()
        after, ours_after = bias().double(), torch.frombuffer(controller.biases(), dtype=torch.float64)
        assert torch.equal(torch.sign((after - before).round(decimals=6)), torch.sign((ours_after - ours).round(decimals=6)))
        largest = max(largest, (after - ours_after).abs().max().item())
    assert largest < 1e-5
    assert bias().abs().max() > 0.05


# ---- Megatron-Core ----


@pytest.fixture(scope="class")
def megatron(tmp_path_factory):
    # Kernels in Triton, which Debian does not have, and for inference, with types that are newer than torch 2.6.
    absent = ["megatron.core.transformer.moe.ops.paged_stash", "megatron.core.inference.quantization.mxfp8_tensor"]
    with checkout("megatron-lm", absent=absent) as load, pytest.MonkeyPatch.context() as patch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Transformer Engine and Apex, which are not installed
            names = ["transformer.moe.router", "distributed.finalize_model_grads", "process_groups_config",
                     "transformer.transformer_config"]
            router, gradients, groups, settings = (load("megatron.core." + name) for name in names)
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")  # where its routers put their buffers
        store = tmp_path_factory.mktemp("ranks") / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        all_ranks = groups.ProcessGroupCollection()
        for name in ("tp", "pp", "cp", "tp_cp", "dp_cp", "tp_dp_cp"):
            setattr(all_ranks, name, torch.distributed.group.WORLD)
        all_ranks.embd = all_ranks.pos_embd = None
        with torch.compiler.set_stance("force_eager"):
            yield types.SimpleNamespace(router=router, gradients=gradients, groups=all_ranks, settings=settings,
                                        function=load("megatron.core.distributed").finalize_model_grads)
        torch.distributed.destroy_process_group()


def megatron_model(megatron, layers):
    """layers: number and whether it is of multi-token prediction."""
    settings = megatron.settings.TransformerConfig(
        num_layers=2, hidden_size=WIDTH, num_attention_heads=1, num_moe_experts=EXPERTS, moe_router_topk=TOP_K,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=RATE,
        moe_router_load_balancing_type="none", moe_router_dtype="fp32", add_bias_linear=False)
    model = torch.nn.ModuleList()
    for number, prediction in layers:
        router = megatron.router.TopKRouter(settings, megatron.groups, is_mtp_layer=prediction)
        router.set_layer_number(number)
        skewed(router.weight)
        model.append(router)
    model.config, model.finish_grad_sync = settings, lambda **_: None
    return model


class TestMegatron:
    def test_recipe(self, megatron, monkeypatch):
        import balance_megatron

        monkeypatch.setattr(megatron.gradients, "_update_router_expert_bias", megatron.gradients._update_router_expert_bias)
        model, tokens = megatron_model(megatron, [(1, False), (2, False), (1, True)]), Tokens()
        balancer = balance_megatron.balance([model], config(), megatron.groups.tp_dp_cp)

        def batch():
            for router in model:
                router(tokens().unsqueeze(1))
            megatron.function([model], pg_collection=megatron.groups)
            assert not any(router.local_tokens_per_expert.any() for router in model)
            balancer.step(loss=2.0, skipped=False)

        balances(balancer, batch, lambda: [router.expert_bias for router in model])
        assert list(balancer.report()) == [1, 2, 3]

    def test_its_own_update_moves_as_sign_bias(self, megatron):
        model, tokens = megatron_model(megatron, [(1, False)]), Tokens()
        router = model[0]
        moves_as_sign_bias(lambda: router(tokens().unsqueeze(1)), lambda: router.local_tokens_per_expert,
                           lambda: megatron.function([model], pg_collection=megatron.groups), lambda: router.expert_bias)


# ---- torchtitan ----


@pytest.fixture(scope="class")
def torchtitan():
    # Not in Debian: spmd_types, for a way of sharding that is off by default; tyro, for the command line; triton, for
    # kernels. flex_shard is an optimizer that is not used here. The bare packages import whole models and checkpoints.
    bare = ["torchtitan.models.common", "torchtitan.protocols", "torchtitan.components.checkpointer"]
    absent = ["spmd_types", "tyro", "triton", "torchtitan.distributed.flex_shard"]
    with checkout("torchtitan", bare=bare, absent=absent) as load:
        names = ["moe", "linear", "token_dispatcher"]
        yield types.SimpleNamespace(optimizer=load("torchtitan.components.optimizer"),
                                    **{name: load("torchtitan.models.common." + name) for name in names})


def torchtitan_model(torchtitan):
    moe = torchtitan.moe
    experts = moe.RoutedExperts.Config(
        inner_experts=moe.GroupedExperts.Config(dim=WIDTH, hidden_dim=4, num_experts=EXPERTS),
        token_dispatcher=torchtitan.token_dispatcher.LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K))
    router = moe.TokenChoiceTopKRouter.Config(
        num_experts=EXPERTS, top_k=TOP_K, gate=torchtitan.linear.Linear.Config(in_features=WIDTH, out_features=EXPERTS))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleDict({"0": torch.nn.Linear(WIDTH, WIDTH)})
    model.layers["0"].moe_enabled = False
    for name in ("1", "2"):
        block = torch.nn.Module()
        block.moe_enabled = True
        block.moe = moe.MoE.Config(num_experts=EXPERTS, routed_experts=experts, router=router,
                                   load_balance_coeff=RATE).build()
        # What the experts compute matters to no count, and needs a kernel of newer versions of torch.
        block.moe.routed_experts.forward = lambda tokens, *_: tokens
        skewed(block.moe.router.gate.weight)
        model.layers[name] = block
    settings = torchtitan.optimizer.default_adamw(lr=0.0)
    settings.implementation = "for-loop"
    return model, settings.build(model_parts=[model])


class TestTorchtitan:
    def test_recipe(self, torchtitan):
        import balance_torchtitan

        (model, optimizers), tokens = torchtitan_model(torchtitan), Tokens()
        layers = [model.layers[name].moe for name in ("1", "2")]
        balancer = balance_torchtitan.balance([model], optimizers, config())
        for moe in layers:  # as the trainer does it before the first step
            moe._init_self_buffers()

        def batch():
            for moe in layers:
                moe(tokens())
            optimizers.step()

        balances(balancer, batch, lambda: [moe.expert_bias_E for moe in layers])
        assert list(balancer.report()) == [1, 2]

    def test_its_own_update_moves_as_sign_bias(self, torchtitan):
        (model, optimizers), tokens = torchtitan_model(torchtitan), Tokens()
        alone = types.SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp=1)
        torchtitan.optimizer.register_moe_load_balancing_hook(optimizers, [model], alone)
        moe = model.layers["1"].moe
        moves_as_sign_bias(lambda: moe(tokens()), lambda: moe.tokens_per_expert_E, optimizers.step, lambda: moe.expert_bias_E,
                           zero_mean=True)


# ---- OLMo-core ----


@pytest.fixture(scope="class")
def olmo_core():
    # olmo_core.nn imports models for images. Not in Debian: cached_path and dataclass_extensions, for files of settings.
    with checkout("olmo-core/src", bare=["olmo_core.nn"], absent=["cached_path", "dataclass_extensions"]) as load:
        yield load("olmo_core.nn.moe.router")


class OlmoModel(torch.nn.Module):
    def __init__(self, olmo_core, layers):
        super().__init__()
        settings = olmo_core.MoERouterConfig(top_k=TOP_K, bias_gamma=RATE,
                                             gating_function=olmo_core.MoERouterGatingFunction.sigmoid)
        self.routers = torch.nn.ModuleList(settings.build(WIDTH, EXPERTS, lb_loss_weight=0.01) for _ in range(layers))
        for router in self.routers:
            with torch.no_grad():
                skewed(router.weight.view(EXPERTS, WIDTH))

    def post_batch(self, dry_run=False):
        for router in self.routers:
            router.post_batch(dry_run=dry_run)


class TestOlmoCore:
    def test_recipe(self, olmo_core):
        import balance_olmo_core

        model, tokens = OlmoModel(olmo_core, 2), Tokens()
        counts = [router.score_bias_batch_size_per_expert for router in model.routers]
        balancer = balance_olmo_core.balance(model, config())
        for router in model.routers:
            router(tokens().unsqueeze(0))
        model.post_batch(dry_run=True)

        def batch():
            for router in model.routers:
                router(tokens().unsqueeze(0))
            model.post_batch()

        balances(balancer, batch, lambda: [router.score_bias for router in model.routers])
        assert all(router.score_bias_batch_size_per_expert is own for router, own in zip(model.routers, counts))
        assert [router.lb_loss_weight for router in model.routers] == [0.01, 0.01]

    def test_its_own_update_moves_as_sign_bias(self, olmo_core):
        model, tokens = OlmoModel(olmo_core, 1), Tokens()
        router = model.routers[0]
        moves_as_sign_bias(lambda: router(tokens().unsqueeze(0)), lambda: router.score_bias_batch_size_per_expert,
                           model.post_batch, lambda: router.score_bias)


# ---- NeMo AutoModel ----


@pytest.fixture(scope="class")
def nemo_automodel():
    # The bare package imports pipelines, which need a newer torch than 2.6. transformers, which trixie does not have,
    # only loads checkpoints here.
    absent = [] if importlib.util.find_spec("transformers") else ["transformers"]
    with checkout("automodel", bare=["nemo_automodel.components.distributed"], absent=absent) as load:
        yield types.SimpleNamespace(layers=load("nemo_automodel.components.moe.layers"),
                                    config=load("nemo_automodel.components.moe.config"))


class NemoModel(torch.nn.Module):
    def __init__(self, nemo, layers):
        super().__init__()
        settings = nemo.config.MoEConfig(
            n_routed_experts=EXPERTS, n_shared_experts=0, n_activated_experts=TOP_K, n_expert_groups=1, n_limited_groups=1,
            train_gate=True, gate_bias_update_factor=RATE, aux_loss_coeff=0.01, score_func="sigmoid", route_scale=1.0,
            dim=WIDTH, inter_dim=4, moe_inter_dim=4, norm_topk_prob=False, dtype=torch.float32)
        self.gates = torch.nn.ModuleList(nemo.layers.Gate(settings) for _ in range(layers))
        for gate in self.gates:
            skewed(gate.weight)

    def forward(self, tokens):
        for gate in self.gates:
            gate(tokens, torch.ones(TOKENS, dtype=torch.bool), None)

    def update_moe_gate_bias(self):
        for gate in self.gates:
            gate.update_bias()


class TestNemoAutomodel:
    def test_recipe(self, nemo_automodel):
        import balance_nemo_automodel

        model, tokens = NemoModel(nemo_automodel, 2), Tokens()
        balancer = balance_nemo_automodel.balance(model, config())

        def batch():
            model(tokens())
            model.update_moe_gate_bias()

        balances(balancer, batch, lambda: [gate.e_score_correction_bias for gate in model.gates])
        assert [gate.aux_loss_coeff for gate in model.gates] == [0.01, 0.01]

    def test_its_own_update_moves_as_sign_bias(self, nemo_automodel):
        model, tokens = NemoModel(nemo_automodel, 1), Tokens()
        gate = model.gates[0]
        moves_as_sign_bias(lambda: model(tokens()), lambda: gate._cumulative_expert_load, model.update_moe_gate_bias,
                           lambda: gate.e_score_correction_bias)


# ---- Hugging Face transformers ----


def test_huggingface_trainer(tmp_path):
    """A small DeepSeek-V3 under transformers' own Trainer."""
    transformers = pytest.importorskip("transformers", reason="python3-transformers is not installed")
    pytest.importorskip("accelerate", reason="python3-accelerate is not installed")
    import balance_huggingface

    torch.manual_seed(3)
    settings = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=16, moe_intermediate_size=4, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=1,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=4, max_position_embeddings=64)
    model = transformers.DeepseekV3ForCausalLM(settings)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for gate in gates:
        skewed(gate.weight)
        gate.weight.requires_grad_(False)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[:, 0] = 1  # which the norms scale, but leave positive
    callback = balance_huggingface.Balance(model, config(), bias="e_score_correction_bias")
    ratios, addresses = [], [gate.e_score_correction_bias.data_ptr() for gate in gates]

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            assert all(sum(record["counts"]) == TOKENS * TOP_K for record in callback.balancer.report(arrays=True).values())
            ratios.append(callback.balancer.controller.report().over_floor)

    rows = torch.randint(64, (140 * 16, 32), generator=torch.Generator().manual_seed(9))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=140, per_device_train_batch_size=8, gradient_accumulation_steps=2, use_cpu=True,
        learning_rate=1e-4, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no")
    transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows],
                         callbacks=[callback, Watch()]).train()
    assert len(ratios) == 140 and ratios[0] > 3
    assert sum(ratios[60:]) / 80 <= 1.3
    assert [gate.e_score_correction_bias.data_ptr() for gate in gates] == addresses
