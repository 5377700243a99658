"""moectl keeps the experts of a Mixture-of-Experts model evenly loaded while it trains.

    controller = moectl.Controller("adaptive_bias.yaml")
    ...forward:   controller.record(layer, experts)      # any number of times, from any threads
    ...optimizer: controller.step(loss=loss)             # once an optimizer step
    ...router:    controller.bias(layer), controller.aux_loss_weight(layer), controller.temperature(layer)

With PyTorch, `moectl.torch.Balancer` does this for the modules of a model. docs/python.md has the rest.
"""

from typing import TYPE_CHECKING, Any

from ._errors import ArgumentError, ConfigError, MoectlError, ReductionError, StateError
from ._tool import compare, metrics, report, simulate

__all__ = [
    "Controller", "Report", "MoectlError", "ArgumentError", "ConfigError", "StateError", "ReductionError", "metrics",
    "compare", "report", "simulate",
]

if TYPE_CHECKING:
    from ._controller import Controller, Report

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        # libmoectl is loaded by the first who needs it: moectl.convert and the tool's answers do without.
        if name in ("Controller", "Report"):
            from . import _controller

            return getattr(_controller, name)
        if name == "__version__":
            from . import _library

            return _library.version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
