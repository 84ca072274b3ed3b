"""The page of a server: its OpenAPI description to read, with nothing to load from elsewhere."""

import html
import json
import re
import shlex
from typing import Any

_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>armo</title>
<style>body { font: 1rem/1.5 sans-serif; max-width: 60rem; margin: auto; padding: 1rem }
pre { background: #8882; padding: .5rem; overflow-x: auto }</style>
<h1>armo</h1><p>The same for programs: <a href="openapi.json">openapi.json</a></p>
"""
_KEY = ' -H "Authorization: Bearer $ARMO_API_KEY"'


def api_page(api: dict[str, Any]) -> str:
    """Show what a server takes and answers.

    Args:
        api: Its OpenAPI description.

    Returns:
        A page of HTML.
    """
    shapes = api["components"]["schemas"]
    parts = [_HEAD]
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            taken, answered = operation.get("requestBody", {}), operation["responses"]["200"]
            example = _KEY if "security" in operation else ""
            example += _example(shapes.get(_name(taken)))
            parts.append(
                f"<h2>{method.upper()} {path}</h2><p>{html.escape(operation['summary'])}</p>"
                f"<p>Takes {_link(taken)}, answers {_link(answered)}</p>"
                f"<pre>curl http://HOST:PORT{path}{html.escape(example)}</pre>"
            )
    for name, shape in shapes.items():
        text = html.escape(json.dumps(shape, indent=2), quote=False)
        text = re.sub(r'"#/components/schemas/(\w+)"', r'<a href="#\1">\1</a>', text)
        parts.append(f'<h2 id="{name}">{name}</h2><pre>{text}</pre>')
    return "\n".join(parts)


def _name(body: dict[str, Any]) -> str:
    shape = body.get("content", {}).get("application/json", {}).get("schema", {})
    return str(shape.get("$ref", "")).rpartition("/")[2]


def _link(body: dict[str, Any]) -> str:
    name = _name(body)
    return f'<a href="#{name}">{name}</a>' if name else ", ".join(body.get("content", ["nothing"]))


def _example(shape: dict[str, Any] | None) -> str:
    if shape is None:
        return ""
    if "examples" not in shape:  # texts that depend on the chat template
        return " --json @FILE"
    body = json.dumps(shape["examples"][0])
    return f" -H 'Content-Type: application/json' -d {shlex.quote(body)}"
