"""OLMo-core, with a `bias_gamma`, so that its routers have a bias.

They count in `score_bias_batch_size_per_expert` and add `score_bias`. The train module calls `model.post_batch` after each
batch: that call is replaced. Where the config has an auxiliary loss, the routers get its weight.

    balancer = balance(model, "adaptive_bias.yaml", group)
"""

from moectl.torch import Balancer


def balance(model, config, group=None):
    routers = [module for module in model.modules() if hasattr(module, "score_bias_batch_size_per_expert")]
    balancer = Balancer(config, routers, counts="score_bias_batch_size_per_expert", bias="score_bias", group=group)

    def post_batch(dry_run=False):
        if dry_run:  # a batch that is no part of the training
            for router in routers:
                router.score_bias_batch_size_per_expert.zero_()
            return
        balancer.step()
        for layer, router in enumerate(routers):
            router.lb_loss_weight = balancer.aux_loss_weight(layer) or router.lb_loss_weight

    model.post_batch = post_batch
    return balancer
