"""The description of the HTTP interface in OpenAPI 3.1, its schemas taken from the types that are read and written."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from .. import __version__
from .folder import JOB_ID, UPLOAD_ID
from .jobs import BOUNDS, LONGEST_VERSION, SHARE, STATES, JobOptions
from .recorded import FailuresView
from .requests import LONGEST_KEY, MOST_AT_ONCE, MOST_ITEMS, ChangeRequest, JobRequest
from .views import JobView

_JSON = "application/json"
_ID: dict[str, Any] = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": f"^{JOB_ID.pattern}$"},
    "description": "The id of a job.",
}


def _query(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _header(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


def _json(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {_JSON: {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_PROBLEMS = {
    "400": "The request can not be read.",
    "401": "It lacks the token.",
    "403": "It comes from a page of another site.",
    "404": "There is no such job.",
    "405": "The path has no such method.",
    "408": "The body came too slowly.",
    "409": "The state of the job does not allow it.",
    "413": "It is too large.",
    "414": "Its target is too long.",
    "415": "Its body is not JSON.",
    "416": "The range begins behind the end.",
    "421": "It names another host.",
    "422": "It can be read, but not be done.",
    "429": "There are too many.",
    "431": "Its headers are too large.",
    "500": "The server failed.",
    "503": "The service has not started, or is busy: try again.",
    "507": "The storage of the service failed, or is full.",
}


def _operation(
    name: str,
    summary: str,
    answers: dict[str, Any],
    *problems: str,
    parameters: list[dict[str, Any]] | None = None,
    body: dict[str, Any] | None = None,
) -> dict[str, Any]:
    always = ("400", "401", "403", "405", "408", "413", "414", "421", "429", "431", "500", "503")
    refused = {code: {"$ref": f"#/components/responses/{code}"} for code in sorted({*always, *problems})}
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": {**answers, **refused}}
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = {"required": _JSON in body, "content": body}
    return operation


_LINKS = {
    name: {"operationId": name, "parameters": {"id": "$response.body#/id"}}
    for name in (
        *("getJob", "events", "output", "failures", "pause", "unpause", "cancel", "retryFailed", "change", "delete"),
    )
}
_A_JOB = {"200": _json("The job.", _ref("JobView"))}


def _step(name: str, summary: str) -> dict[str, Any]:
    return {"post": _operation(name, summary, _A_JOB, "404", "409", "507", parameters=[_ID])}


def _looks() -> dict[str, Any]:
    jobs: dict[str, Any] = {"type": "object", "required": ["jobs", "next"]}
    next_id = {"type": ["string", "null"]}
    jobs["properties"] = {"jobs": {"type": "array", "items": _ref("JobView")}, "next": next_id}
    number = {"type": "integer", "minimum": 1, "maximum": MOST_AT_ONCE}
    return {
        "/service": {
            "get": _operation("service", "What this service is, and allows", {"200": _json("It.", {"type": "object"})})
        },
        "/healthz": {
            "get": _operation("healthz", "The process answers", {"200": _json("It does.", {"type": "object"})})
        },
        "/readyz": {
            "get": _operation("readyz", "The service takes jobs", {"200": _json("It does.", {"type": "object"})})
        },
        "/metrics": {
            "get": _operation(
                "metrics",
                "For Prometheus",
                {"200": {"description": "The metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
            )
        },
        "/jobs": {
            "get": _operation(
                "listJobs",
                "The jobs, the newest first",
                {"200": _json("Some of the jobs, and where to go on.", jobs)},
                "404",
                parameters=[
                    _query("state", {"$ref": "#/components/schemas/State"}, "Only jobs in that state."),
                    _query("limit", number, "How many at most."),
                    _query("after", _ID["schema"], "Go on behind that job: `next` of the answer before."),
                ],
            )
        },
        "/jobs/{id}": {"get": _operation("getJob", "One job", _A_JOB, "404", parameters=[_ID])},
        **_looks_into_a_job(),
    }


def _looks_into_a_job() -> dict[str, Any]:
    number = {"type": "integer", "minimum": 0, "maximum": MOST_AT_ONCE}
    lines = {"schema": {"type": "string"}}
    return {
        "/jobs/{id}/events": {
            "get": _operation(
                "events",
                "Server-Sent Events: `job` at each change, `sample` each second while it runs",
                {"200": {"description": "The events.", "content": {"text/event-stream": lines}}},
                "404",
                parameters=[_ID, _header("Last-Event-ID", {"type": "string"}, "Only what came after that event.")],
            )
        },
        "/jobs/{id}/output": {
            "get": _operation(
                "output",
                "The output in JSON Lines, as far as it is committed; understands Range",
                {
                    "200": {"description": "All of it.", "content": {"application/x-ndjson": lines}},
                    "206": {"description": "The range.", "content": {"application/x-ndjson": lines}},
                    "304": {"description": "It has not changed."},
                },
                "404",
                "416",
                parameters=[_ID],
            )
        },
        "/jobs/{id}/failures": {
            "get": _operation(
                "failures",
                "The recorded failures, as far as they are committed",
                {"200": _json("Some of them, and the groups of all.", _ref("FailuresView"))},
                "404",
                parameters=[
                    _ID,
                    _query("limit", number, "How many at most."),
                    _query(
                        "after",
                        {"type": "integer", "minimum": 0, "maximum": 10**18},
                        "Go on there: `next` of the answer before.",
                    ),
                ],
            )
        },
    }


def _acts() -> dict[str, Any]:
    key = {"type": "string", "minLength": 1, "maxLength": LONGEST_KEY, "pattern": "^[ -~]+$"}
    upload = {"type": "object", "required": ["id", "name", "bytes"], "properties": {"id": {"type": "string"}}}
    octets = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "/uploads": {
            "post": _operation(
                "upload",
                "Send a file of items",
                {"201": _json("It is kept for a day.", upload)},
                "507",
                parameters=[_query("name", {"type": "string"}, "Its name: the suffix tells its format.")],
                body=octets,
            )
        },
        "/jobs": {
            "post": _operation(
                "submit",
                "Make a job",
                {
                    "200": _json("It was made before, with this Idempotency-Key.", _ref("JobView")),
                    "201": {**_json("It is made.", _ref("JobView")), "links": _LINKS},
                },
                *("404", "409", "415", "422", "507"),
                parameters=[_header("Idempotency-Key", key, "Makes a repeated request the same job.")],
                body={_JSON: {"schema": _ref("AskedJobRequest")}},
            )
        },
        "/jobs/{id}/pause": _step("pause", "Begin nothing more of it"),
        "/jobs/{id}/unpause": _step("unpause", "Go on with it"),
        "/jobs/{id}/cancel": _step("cancel", "End it for good"),
        "/jobs/{id}/retry-failed": _step(
            "retryFailed", "Run the failed items of a complete job again; go on with a failed one"
        ),
        "/jobs/{id}": {
            "patch": _operation(
                "change",
                "Change its concurrency or its rate, also while it runs",
                _A_JOB,
                *("404", "409", "415", "422", "507"),
                parameters=[_ID],
                body={_JSON: {"schema": _ref("AskedChangeRequest")}},
            ),
            "delete": _operation(
                "delete",
                "Forget an ended job, with its output",
                {"204": {"description": "It is gone."}},
                "404",
                "409",
                "507",
                parameters=[_ID],
            ),
        },
    }


_INPUTS: dict[str, dict[str, Any]] = {
    "path": {"type": "string", "minLength": 1, "description": "Of a file, relative to the service's folder."},
    "items": {"type": "array", "items": {}, "maxItems": MOST_ITEMS, "description": "Any JSON values."},
    "upload": {"type": "string", "pattern": f"^{UPLOAD_ID.pattern}$", "description": "The id of an upload."},
}

_FORMAT = {"enum": ["text", "lines", "jsonl", "csv", "tsv", None], "description": "By its suffix, if it is not given."}


def _only(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    properties = {name: schema} if name == "items" else {name: schema, "format": _FORMAT}
    return {"type": "object", "properties": properties, "required": [name], "additionalProperties": False}


def _bound(field: str, schema: dict[str, Any]) -> None:
    for one in schema.get("anyOf", [schema]):
        if one.get("type") in ("integer", "number"):
            one["minimum"], one["maximum"] = BOUNDS[field]
        elif one.get("type") == "string":
            one.update({"pattern": f"^{SHARE}$"} if field == "max_failures" else {"maxLength": LONGEST_VERSION})


def _asked(workers: tuple[str, ...], max_concurrency: int) -> dict[str, Any]:
    """The schemas of what may be asked, with all their bounds; an answer may show what was remembered under others."""
    types = [JobRequest, JobOptions, ChangeRequest]
    _, found = msgspec.json.schema_components(types, ref_template="#/components/schemas/Asked{name}")
    for name in ("JobOptions", "RetryOptions", "RecordOptions", "ChangeRequest"):
        for field, schema in found[name]["properties"].items():
            _bound(field, schema)
    for name in ("JobOptions", "ChangeRequest"):
        found[name]["properties"]["concurrency"]["maximum"] = max_concurrency
    found["ChangeRequest"]["minProperties"] = 1
    job = found["JobRequest"]["properties"]
    job["worker"]["enum"] = workers
    job["options"] = _ref("AskedJobOptions")
    found["InputRequest"] = {"oneOf": [_only(name, schema) for name, schema in _INPUTS.items()]}
    return {f"Asked{name}": schema for name, schema in found.items()}


@functools.cache
def document(workers: tuple[str, ...], max_concurrency: int, *, read_only: bool) -> bytes:
    """The document of a service with these workers."""
    _, schemas = msgspec.json.schema_components([JobView, FailuresView], ref_template="#/components/schemas/{name}")
    schemas |= _asked(workers, max_concurrency)
    schemas["State"] = {"enum": STATES}
    schemas["Problem"] = {
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
        },
    }
    problems = {
        code: {"description": text, "content": {"application/problem+json": {"schema": _ref("Problem")}}}
        for code, text in _PROBLEMS.items()
    }
    paths = _looks()
    if not read_only:
        for path, operations in _acts().items():
            paths.setdefault(path, {}).update(operations)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "async_recovery",
                "version": __version__,
                "description": "Jobs that are done once, all of them, whatever happens to the machine.",
            },
            "paths": paths,
            "components": {
                "schemas": schemas,
                "responses": problems,
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{}, {"token": []}],
        }
    )
