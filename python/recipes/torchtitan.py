"""torchtitan, with `load_balance_coeff` above 0, so that its MoE layers have a bias.

They count in `tokens_per_expert_E` and add `expert_bias_E`, which may be DTensors and are re-created when the model is
initialised. Build the optimizers with `build_optimizers` instead of `build_optimizers_with_moe_load_balancing`, whose
hook this one replaces. Under full activation checkpointing the counts are twice the tokens.

    balancer = balance(model, optimizers, "adaptive_bias.yaml", group)
"""

from moectl.torch import Balancer


def balance(model, optimizers, config, group=None):
    layers = [module for module in model.modules() if hasattr(module, "tokens_per_expert_E")]
    balancer = Balancer(config, layers, counts="tokens_per_expert_E", bias="expert_bias_E", group=group)
    optimizers.register_step_pre_hook(lambda *_, **__: balancer.step())
    return balancer
