"""What differential privacy a run has bought: epsilon, by a well-kept accountant.

Each reply is one Gaussian mechanism whose sensitivity is the clip: it is compared with the reply of an agent
that has no samples at all. An agent's epsilon is that of all its replies together. Who is asked follows from
public hashes, hence nothing is claimed for the sampling. Adds no noise itself (``edge_agent.privacy``).
"""

import math

from profiles.errors import ConfigError

__all__ = ["check_accountant", "epsilon"]


def check_accountant() -> None:
    """Do nothing if the accountant is installed.

    Raises:
        ConfigError: It is not.
    """
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise ConfigError(
            "differential privacy needs an accountant, and none is installed",
            hint="Install it: pip install 'scalarfed[privacy]'. Or remove `noise` under [privacy].",
        ) from None


def epsilon(noise: float, replies: int, *, delta: float) -> float:
    """Return the epsilon of one agent's replies at ``delta``.

    Args:
        noise: Standard deviation in clips; 0 gives infinity.
        replies: How many it sent.
        delta: 0 < delta < 1.

    Raises:
        ConfigError: The accountant is not installed.
    """
    if replies == 0:
        return 0.0
    if noise <= 0:
        return math.inf
    check_accountant()
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(noise), replies)
    return float(accountant.get_epsilon(delta))
