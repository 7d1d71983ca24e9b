"""What a caller reads of an error.

Run: python -m helpers test tests/unit/serving/test_errors.py
"""

import json

import pytest
from mlflow.exceptions import MlflowException
from support.chat import SECRET

from serving.errors import ServiceError, hide_password, to_service_error
from serving.events import to_json
from serving.service.answer import to_response


class Refusal(MlflowException):
    def __init__(self, code, field=None):
        super().__init__(f"{code} it is.")
        self.code, self.field = code, field


@pytest.mark.parametrize(
    "error, status, code, param, told",
    [
        (Refusal("invalid_value", "top_p"), 400, "invalid_value", "top_p", True),
        (
            Refusal("context_length_exceeded", "messages"),
            400,
            "context_length_exceeded",
            "messages",
            True,
        ),
        (Refusal("busy"), 429, "busy", None, True),
        (Refusal("closed"), 503, "closed", None, True),
        (Refusal("failed"), 500, "failed", None, True),
        (MlflowException.invalid_parameter_value(SECRET), 400, "invalid_value", None, False),
        (MlflowException(SECRET), 500, "failed", None, False),
        (ValueError(SECRET), 500, "failed", None, False),
        (KeyboardInterrupt(SECRET), 500, "failed", None, False),
        (ServiceError(418, "A teapot.", "teapot", "pot"), 418, "teapot", "pot", True),
    ],
)
def test_what_a_caller_reads_of_an_error(error, status, code, param, told):
    said = to_service_error(error)
    assert (said.status, said.code, said.param) == (status, code, param)
    assert said.retry_after == (1 if status == 429 else None)
    assert told == (said.message == getattr(error, "message", None))
    assert SECRET not in said.message


@pytest.mark.parametrize(
    ("error", "kind", "headers"),
    [
        (ServiceError(400, "x", "invalid_value", "n"), "invalid_request_error", {}),
        (
            ServiceError(401, "x", "invalid_api_key"),
            "authentication_error",
            {"www-authenticate": "Bearer"},
        ),
        (ServiceError(404, "x", "not_found"), "not_found_error", {}),
        (ServiceError(429, "x", "busy", retry_after=7), "rate_limit_error", {"retry-after": "7"}),
        (ServiceError(500, "x", "failed"), "server_error", {}),
        (ServiceError(504, "x", "timeout"), "server_error", {"x-should-retry": "false"}),
    ],
)
def test_an_error_is_openais_object_with_the_headers_that_its_clients_follow(error, kind, headers):
    response = to_response(error)
    assert response.status_code == error.status
    assert json.loads(response.body) == {
        "error": {"message": "x", "type": kind, "code": error.code, "param": error.param}
    }
    assert {
        name: value for name, value in response.headers.items() if not name.startswith("content-")
    } == headers


def test_a_password_in_an_address_is_not_shown():
    text = f"http://user:{SECRET}@there:80/a and b@c"
    assert hide_password(text) == "http://there:80/a and b@c"


def test_json_holds_no_character_at_which_a_client_may_end_the_line():
    text = to_json({"a": "1\x852\u20283\u20294é\n"})
    assert text == '{"a":"1\\u00852\\u20283\\u20294é\\n"}'.encode()
    assert json.loads(text) == {"a": "1\x852\u20283\u20294é\n"}
