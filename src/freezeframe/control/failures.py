"""What a refused action looks like to the outside: Cloud Hypervisor's chain of texts and an HTTP status."""

from __future__ import annotations

from freezeframe.errors import FreezeframeError, InvalidState, IoFailed, chain_messages

BAD_REQUEST = 400
NOT_FOUND = 404
INTERNAL = 500
NOT_IMPLEMENTED = 501


class ActionFailed(FreezeframeError):
    """An action that was refused or failed. `chain` is outermost first and ends with the cause.

    The status is v53's: 404 where there is no VM or no configuration to speak of, 400 for a body that cannot be read,
    500 for everything else; 501 is ours, for what this VMM does not implement.
    """

    code = "action"

    def __init__(self, *chain: str, status: int = INTERNAL, cause: BaseException | None = None) -> None:
        texts = [*chain, *([] if cause is None else chain_messages(cause))]
        super().__init__(texts[-1])
        self.texts = texts
        self.status = status


def bottom(failure: ActionFailed) -> FreezeframeError:
    """What a program or a command of ours gets: the error below CH's chain of texts. To be raised from its cause."""
    cause = failure.__cause__
    if isinstance(cause, FreezeframeError) and not isinstance(cause, ActionFailed):
        return cause
    text = ": ".join(failure.texts)
    error = IoFailed(text) if isinstance(cause, OSError) else InvalidState(text)
    error.__cause__ = cause or failure
    return error
