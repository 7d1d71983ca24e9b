"""Serves an MLflow chat model to OpenAI's clients over HTTP.

Read the files in this order: `command_line` (options, and how the program starts and ends), `app`
(the routes), `answer` (one request, from its turn to its last byte), `admission` (how many requests
may be in the model), `active_version` (which version answers, and how the next one takes over),
`metrics` (what /metrics shows), `connection` (what uvicorn leaves without a limit), `http_server`
(how uvicorn runs the routes). What the service shares with the other programs lies beside this
package: `errors` (what a caller may read of an error), `events`, `request` and `served_model`.
Nothing here imports the course.
"""
