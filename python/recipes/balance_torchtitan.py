"""torchtitan, with `load_balance_coeff` above 0, so that its MoE layers have a bias.

They count in `tokens_per_expert_E` and add `expert_bias_E`, which may be DTensors and are re-created when the model is
initialised. The trainer calls `post_optimizer_build_fn` of the ModelSpec, which registers torchtitan's own update as a
hook of the optimizers: this one takes its place. Under full activation checkpointing the counts are twice the tokens.

    def post_optimizer_build_fn(optimizers, model_parts, parallel_dims):
        balance(model_parts, optimizers, "adaptive_bias.yaml", group)

`group`: ranks with other tokens of the same layers, parallel_dims.get_optional_mesh("loss").get_group().
"""

from moectl.torch import Balancer


def balance(model_parts, optimizers, config, group=None):
    layers = {int(name): module for part in model_parts for name, block in part.get_submodule("layers").items()
              for module in block.modules() if hasattr(module, "tokens_per_expert_E")}
    balancer = Balancer(config, layers.values(), counts="tokens_per_expert_E", bias="expert_bias_E", group=group,
                        layer_ids=list(layers))

    def hook(*_):  # must return None
        balancer.step()

    optimizers.register_step_pre_hook(hook)
    return balancer
