"""What can go wrong while producing."""


class ProducerError(Exception):
    """Root of every error that samplers and strategies raise for a reason of their own."""


class DatasetError(ProducerError, ValueError):
    """The dataset is empty, cannot be resumed, is not the one the run began with, or has a row without a prompt."""


class FailureBudgetError(ProducerError, RuntimeError):
    """Too many groups of a batch failed or were filtered: production stops rather than going on for ever."""


class StalledError(ProducerError, TimeoutError):
    """No group ended for too long while rollouts run; the message names them. Raised with `on_stall="raise"`."""
