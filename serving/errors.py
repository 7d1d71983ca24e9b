"""Turns exceptions into errors that a caller may read: OpenAI's error object.

The service, the batch program and Azure's scoring script share it.
"""

import logging
import re
import traceback

from mlflow.exceptions import MlflowException

_logger = logging.getLogger("serving")

# The HTTP status of a model's refusal, by its code. Any other code is the request's fault: 400.
STATUS_OF_CODE = {"busy": 429, "closed": 503, "failed": 500, "unusable_model": 500}
TYPE_OF_STATUS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ServiceError(Exception):
    """An error that a caller may read.

    Parameters
    ----------
    status : int
        The HTTP status.
    message : str
        What is wrong, and what to do where that does not say it. It quotes nothing of the request.
    code : str
        A word for programs, such as ``invalid_value``.
    param : str, optional
        The field that is wrong.
    retry_after : int, optional
        Seconds after which the request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict:
        """Return OpenAI's error object."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = TYPE_OF_STATUS.get(self.status, default)
        error = {"message": self.message, "type": kind, "code": self.code, "param": self.param}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the headers that OpenAI's clients follow."""
        headers = {"retry-after": str(self.retry_after)} if self.retry_after else {}
        if self.code == "timeout":
            headers["x-should-retry"] = "false"  # OpenAI's client would repeat it at once
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def to_service_error(error: BaseException) -> ServiceError:
    """Turn whatever a model raised into an error that a caller may read.

    A refusal with ``code`` and ``field`` says in its own words what is wrong. A message of MLflow
    or of a library may quote the request or show a path: the caller gets the kind of error alone,
    and the log gets the place in the code.
    """
    if isinstance(error, ServiceError):
        return error
    code = getattr(error, "code", None)
    if isinstance(error, MlflowException) and isinstance(code, str) and hasattr(error, "field"):
        status = STATUS_OF_CODE.get(code, 400)
        return ServiceError(status, error.message, code, error.field, 1 if status == 429 else None)
    frames = "".join(traceback.format_tb(error.__traceback__)[-3:])
    is_mlflows = isinstance(error, MlflowException)
    if is_mlflows and error.message.startswith("Failed to apply chat template"):
        return ServiceError(
            400,
            "messages has to be a conversation that the model's chat template takes.",
            "invalid_value",
            "messages",
        )
    if is_mlflows and error.get_http_status_code() == 400:
        _logger.info("MLflow refused a request:\n%s", frames)
        return ServiceError(
            400, "The model's signature does not allow this request.", "invalid_value"
        )
    _logger.error("The model raised %s:\n%s", type(error).__name__, frames)
    return ServiceError(500, "The model failed on this request. The log tells where.", "failed")


class ProgramError(Exception):
    """A failure that whoever runs a program can mend.

    Parameters
    ----------
    what : str
        One sentence on what happened.
    fix : str
        One sentence on what to do.
    """

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what}\n{fix}")
        self.what = what
        self.fix = fix

    def _render_traceback_(self):  # notebooks show these lines in place of a traceback
        return [f"{type(self).__name__}: {self.what}", self.fix]


def first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, without a full stop."""
    message = (getattr(error, "message", None) or str(error)).strip()
    if not message:
        return type(error).__name__
    return f"{type(error).__name__}: {hide_password(message.splitlines()[0].rstrip('.'))}"


def hide_password(text: str) -> str:
    """Return a text whose addresses, such as a store's, have lost their user and password."""
    return re.sub("//[^/@\\s]*@", "//", text)
