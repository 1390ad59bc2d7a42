"""The errors that a user can cause, as one tree.

Knows nothing of what raises them. A programming mistake is a ``ValueError``; everything below
:class:`ScalarfedError` names the value, the rule and, in :attr:`~ScalarfedError.hint`, the next step.
"""

__all__ = [
    "BenchError",
    "BrokerError",
    "BudgetError",
    "BundleError",
    "ConfigError",
    "DataError",
    "DigestError",
    "EstimateError",
    "FetchError",
    "FlashError",
    "LogError",
    "ModelError",
    "ProfileError",
    "ScalarfedError",
    "SecurityError",
    "StateError",
    "WireError",
]


class ScalarfedError(Exception):
    """Base of all errors that a user can cause.

    Args:
        message: What happened, with the values.
        hint: What to do next; the class's own hint where left out.

    Attributes:
        hint: The next step, one or two sentences.
        exit_code: What the command line returns, 2 to 125.
    """

    hint: str = "Run the same command with --help."
    exit_code: int = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        if hint is not None:
            self.hint = hint


class ConfigError(ScalarfedError):
    """An experiment file or an option says something impossible."""

    hint = "Correct the named keys in the experiment file, or override them with --set key=value."
    exit_code = 3


class DataError(ScalarfedError):
    """A data file is missing, malformed or does not fit the model."""

    hint = "The file must be an .npz with x_train, y_train, x_test and y_test, labels counted from 0."
    exit_code = 4


class ModelError(ScalarfedError):
    """A net cannot be built, pruned or exported as asked."""

    hint = "Choose another model or another density in the experiment file."
    exit_code = 5


class BundleError(ScalarfedError):
    """A bundle is incomplete, altered or of another format."""

    hint = "Make the bundle again, or copy it again from the coordinator."
    exit_code = 6


class ProfileError(ScalarfedError):
    """A device profile is unknown or contradicts itself."""

    hint = "`scalarfed profile list` shows the known devices."
    exit_code = 7


class BudgetError(ScalarfedError):
    """A device may not spend what the work needs."""

    hint = "Prune to a lower density, set a smaller batch size, or leave the device out."
    exit_code = 8


class BrokerError(ScalarfedError):
    """The MQTT broker cannot be started or reached."""

    hint = "Install mosquitto, or name a running broker with --broker mqtt://HOST:PORT."
    exit_code = 9


class WireError(ScalarfedError):
    """A message does not have the layout that its kind prescribes."""

    hint = "Let agent and coordinator run the same release of scalarfed."
    exit_code = 10


class EstimateError(ScalarfedError):
    """A loss is not finite, so that no projected gradient follows from it."""

    hint = "Lower the learning rate or epsilon, and look for values that are not finite in the data."
    exit_code = 11


class LogError(ScalarfedError):
    """A scalar log is missing, of another version or damaged."""

    hint = "`scalarfed log verify RUN` names the first bad row."
    exit_code = 12


class DigestError(LogError):
    """Two replicas, or a replica and its log, disagree."""

    hint = "The log or the bundle was altered: restore both from a copy."
    exit_code = 13


class StateError(ScalarfedError):
    """What an agent or a run keeps on disk cannot be read or written."""

    hint = "Free some disk space, or remove the named file: it will be rebuilt from the log."
    exit_code = 14


class FlashError(ScalarfedError):
    """A card, an image or a machine cannot be made into a board, or a board does not answer."""

    hint = "`scalarfed doctor` on the card or on the board's name says what is wrong."
    exit_code = 20


class SecurityError(ScalarfedError):
    """A certificate, token, key or signature is not what it must be, or a channel is not protected."""

    hint = "See docs/security.md: how a board is enrolled, and what to do when a key is lost."
    exit_code = 22


class BenchError(ScalarfedError):
    """A measurement of this machine did not come to its end."""

    hint = "Run the command again with one --model, and see that memory and disk are free."
    exit_code = 15


class FetchError(ScalarfedError):
    """A file cannot be fetched, or is not what was promised."""

    hint = "Look whether the server is still there and has the file of the same release or run."
    exit_code = 21
