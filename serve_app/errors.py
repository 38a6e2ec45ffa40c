"""What can go wrong, as data: no HTTP words here, `http.py` holds the one table that maps these to a status.

EmbeddingError
├── InvalidInput         the request can't be embedded as it stands; the client must change it
│   └── TooManyTokens    the request holds more tokens than one request may
├── Unauthenticated      a key is needed and none, or an unknown one, was sent
├── ModelNotFound        no model of that name is served here
├── ModelUnavailable     the model is configured, but is still loading or failed to load
├── Overloaded           more work waits than can be answered in time
├── DeadlineExceeded     the answer would come after the client's deadline
├── CallerGone           the caller left before the work began
├── EngineError          the engine failed or gave vectors that can't be right
│   └── EngineBroken     the engine of this replica fails at everything; another replica's may not
└── WeightsError         a model folder is missing, damaged, or of a kind that can't be served

Every error passes all its arguments to `Exception.__init__`, since only then does it survive pickling between
processes with its type; the message is made in `__str__`.
"""


class EmbeddingError(Exception):
    """Base of all errors that the service raises on purpose; its message is safe to show to a client."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class InvalidInput(EmbeddingError):
    """The request can't be embedded as it stands: `message` names the limit and the value, `param` the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.param = param


class TooManyTokens(InvalidInput):
    """The inputs of one request hold more tokens together than one request may."""

    def __init__(self, tokens: int, limit: int) -> None:
        EmbeddingError.__init__(self, tokens, limit)
        self.param = "input"

    def __str__(self) -> str:
        return "Requested {} tokens, max {} tokens per request".format(*self.args)


class Unauthenticated(EmbeddingError):
    """No key was sent, or (`key_was_sent`) one that the keys file does not know."""

    def __init__(self, message: str, key_was_sent: bool) -> None:
        super().__init__(message, key_was_sent)
        self.key_was_sent = key_was_sent


class ModelNotFound(EmbeddingError):
    """No model of that name is served; the message says why and which names are."""


class ModelUnavailable(EmbeddingError):
    """The model is configured, but can't embed now: it is loading, failed to load, or lost its replicas."""


class Overloaded(EmbeddingError):
    """More work waits than can be answered in time; `retry_after_s` is when to come back."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(EmbeddingError):
    """The work was dropped because nobody would wait for its answer any more."""


class CallerGone(EmbeddingError):
    """The caller left before the work began, so it was not done."""


class EngineError(EmbeddingError):
    """The engine failed, or gave vectors that can't be right."""


class EngineBroken(EngineError):
    """The engine of this replica fails at everything, so the call is for another one."""


class WeightsError(EmbeddingError):
    """A model folder is missing, damaged, or of a kind that can't be served."""
