"""Hugging Face transformers: a callback for Trainer.

The models count nothing: a hook before `experts` reads the choices, its second argument [T, k]. Where the config has an
auxiliary loss, the model's coefficient follows the controller. Where the gates have an `e_score_correction_bias`, give
its name as `bias`. Gradient checkpointing that is not reentrant counts twice: shares stay right.

    trainer = Trainer(model, ..., callbacks=[Balance(model, "pi.yaml")])
"""

from moectl.torch import Balancer

try:
    from transformers import TrainerCallback
except ImportError:
    TrainerCallback = object


class Balance(TrainerCallback):
    def __init__(self, model, config, bias=None, group=None):
        blocks = [module for module in model.modules() if hasattr(module, "experts") and hasattr(module, "gate")]
        self.balancer = Balancer(config, [block.gate for block in blocks], counts=None, bias=bias, group=group)
        for layer, block in enumerate(blocks):
            block.experts.register_forward_pre_hook(
                lambda experts, args, layer=layer: self.balancer.record_indices(layer, args[1]) if experts.training else None)

    def on_step_end(self, args, state, control, model=None, **_):
        self.balancer.step()
        weight = self.balancer.aux_loss_weight(0)
        if weight:
            model.router_aux_loss_coef = weight
