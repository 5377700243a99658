"""Megatron-Core, with `--moe-router-enable-expert-bias`.

Its routers count in `local_tokens_per_expert` and add `expert_bias`. `finalize_model_grads` updates the bias before the
loss is known and before it is known whether the optimizer skips: there the counts are taken, and `step` decides after
the train step. `group`: ranks with other tokens of the same layers, parallel_state.get_tensor_and_data_parallel_group(
with_context_parallel=True).

    from megatron.core.distributed import finalize_model_grads
    balancer = balance(model, "adaptive_bias.yaml", finalize_model_grads, group)
    ...
    loss, skipped, *_ = train_step(...)
    balancer.step(loss=loss, skipped=skipped)
"""

from moectl.torch import Balancer


def balance(model_chunks, config, finalize_model_grads, group=None):
    routers = [module for chunk in model_chunks for module in chunk.modules() if hasattr(module, "local_tokens_per_expert")]
    balancer = Balancer(config, routers, counts="local_tokens_per_expert", bias="expert_bias", group=group,
                        layer_ids=[router.layer_number for router in routers])
    finalize_model_grads._update_router_expert_bias = lambda *_, **__: balancer.record()
    return balancer
