"""moectl keeps the experts of a Mixture-of-Experts model evenly loaded while it trains.

    controller = moectl.Controller("adaptive_bias.yaml")
    ...forward:   controller.record(layer, experts)      # any number of times, from any threads
    ...optimizer: controller.step(loss=loss)             # once an optimizer step
    ...router:    controller.bias(layer), controller.aux_loss_weight(layer), controller.temperature(layer)

With PyTorch, `moectl.torch.Balancer` does this for the modules of a model. docs/python.md has the rest.
"""

from ._controller import Controller, Report
from ._errors import ConfigError, MoectlError, ReductionError, StateError
from ._library import version as _version
from ._tool import compare, metrics, report, simulate

__version__ = _version()
__all__ = [
    "Controller", "Report", "MoectlError", "ConfigError", "StateError", "ReductionError", "metrics", "compare",
    "report", "simulate",
]
