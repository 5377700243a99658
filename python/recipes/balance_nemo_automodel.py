"""NeMo AutoModel, with a `gate_bias_update_factor` above 0, without which nothing is counted.

Its gates count in `_cumulative_expert_load`, which is None before the first token, and add `e_score_correction_bias`. The
recipe calls `update_moe_gate_bias` of the model after each optimizer step: that call is replaced. Where the config has
an auxiliary loss, the gates get its weight.

    balancer = balance(model, "adaptive_bias.yaml", group)
"""

from moectl.torch import Balancer


def balance(model, config, group=None):
    gates = [module for module in model.modules() if hasattr(module, "_cumulative_expert_load")]
    balancer = Balancer(config, gates, counts="_cumulative_expert_load", bias="e_score_correction_bias", group=group,
                        reset=lambda gate: setattr(gate, "_cumulative_expert_load", None))

    def update():
        balancer.step()
        for layer, gate in enumerate(gates):
            gate.aux_loss_coeff = balancer.aux_loss_weight(layer) or gate.aux_loss_coeff

    model.update_moe_gate_bias = update
    return balancer
