"""Megatron-Core, with `--moe-router-enable-expert-bias`.

Its routers count in `local_tokens_per_expert` and add `expert_bias`. `finalize_model_grads` updates the bias before the
loss is known and before it is known whether the optimizer skips: there the counts are taken, and `step` decides after
the train step. `group`: ranks with other tokens of the same layers, parallel_state.get_tensor_and_data_parallel_group(
with_context_parallel=True).

    balancer = balance(model, "adaptive_bias.yaml", group)
    ...
    loss, skipped, *_ = train_step(...)
    balancer.step(loss=loss, skipped=skipped)
"""

from importlib import import_module

from moectl.torch import Balancer


def _layer(router):
    """Routers of multi-token prediction number their layers from 1 again: they follow those of the decoder."""
    return router.layer_number + (router.config.num_layers if router.is_mtp_layer else 0)


def balance(model_chunks, config, group=None):
    routers = [module for chunk in model_chunks for module in chunk.modules()
               if getattr(module, "local_tokens_per_expert", None) is not None and not module.frozen_expert_bias]
    balancer = Balancer(config, routers, counts="local_tokens_per_expert", bias="expert_bias", group=group,
                        layer_ids=[_layer(router) for router in routers])
    # The module: megatron.core.distributed has a function of the same name, which `from … import` finds first.
    module = import_module("megatron.core.distributed.finalize_model_grads")
    module._update_router_expert_bias = lambda *_, **__: balancer.record()
    return balancer
