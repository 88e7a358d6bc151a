"""What can go wrong with one replica. None of it reaches the user: a request goes on elsewhere, or fails with the last one as its cause."""


class ReplicaError(Exception):
    """A replica failed: it is gone, hangs, or answered with an error or with nonsense.

    Attributes:
        lost: nothing tells whether the replica is still there; else it answered, if badly.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class OtherWeights(ReplicaError):
    """A replica holds other weights than those in force: what it sampled is theirs, as it says itself at the end of each response."""


class ReplicaBusy(ReplicaError):
    """A replica has no room now (429, 503).

    Attributes:
        retry_after: seconds for which it asked to be left alone; None where it did not say.
    """

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoSuchEndpoint(ReplicaError):
    """The server does not know an endpoint, or keeps it shut (403, 404)."""
