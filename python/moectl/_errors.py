"""What goes wrong, with the words of the library."""


class MoectlError(RuntimeError):
    """All that the library could not do. Its subclasses say what; the messages are those of the C++ library."""


class ConfigError(MoectlError, ValueError):
    """A config that cannot be used: "file:line:column: key: value: constraint"."""


class StateError(MoectlError):
    """A saved state that cannot be loaded: truncated, altered, of another version or another config."""


class ReductionError(MoectlError):
    """A reduction failed, or ranks disagree. The controller is unchanged, and the step may be tried again."""


class ArgumentError(MoectlError, ValueError):
    """An argument that cannot be: an unknown layer, sizes that do not fit together."""
