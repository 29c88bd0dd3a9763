"""The hub's client, whose failures become one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pocketvlm.errors import HubError

__all__ = ["naming_hub_faults"]

_TOLD = {
    401: "the hub does not know who asks; log in with `hf auth login`, or set HF_TOKEN",
    403: "the hub does not allow it with this token",
    404: "there is no such repository or revision, or it is private and this token cannot see it",
    409: "someone else has changed the repository since; try again",
    412: "someone else has changed the repository since; try again",
}
# The client passes on what its libraries for HTTP and storage raise, whatever they are called.
_TRANSPORTS = ("httpx", "httpcore", "hf_xet")


@contextmanager
def naming_hub_faults(repository: str) -> Iterator[None]:
    """Inside, what the client raises is one line that names the repository.

    Raises:
        HubError: The hub refuses, or cannot be reached.
    """
    try:
        yield
    except Exception as error:
        told = _describe(error)
        if told is None:
            raise
        raise HubError(f"{repository}: {told}") from error


def _describe(error: BaseException) -> str | None:
    """What failed; `None` for what did not fail at the hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        code = error.response.status_code if error.response is not None else None
        return _TOLD.get(code or 0, _words(error))
    if isinstance(error, errors.HFValidationError):
        return f"does not name a repository: {_words(error)}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    if type(error).__module__.startswith(_TRANSPORTS):
        return f"the hub cannot be reached: {_words(error)}"
    if isinstance(error, RuntimeError | errors.LocalEntryNotFoundError) and error.__cause__:
        return _describe(error.__cause__)  # of a file that could not be sent or fetched
    return None


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
