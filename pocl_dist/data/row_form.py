"""One line or row -> Example, or the reason why it is none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pocl_dist.guards import shown
from pocl_dist.records import Example

MAX_ROW_BYTES = 4 << 20
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class BadRowError(ValueError):
    """Carries the reason of one bad row to the policy."""


def _refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise BadRowError("a key is given twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_repeated_keys)


def parse_line(line: bytes) -> dict[str, object]:
    """Returns the JSON object of one line; raises ValueError with the reason."""
    if len(line) > MAX_ROW_BYTES:
        raise BadRowError(f"longer than {MAX_ROW_BYTES} bytes")
    try:
        text = line.rstrip(b"\r\n").decode("utf-8")
        # `loads` says more about a BOM, but makes a decoder for each call.
        is_bom = text.startswith("\ufeff")
        row = json.loads(text) if is_bom else _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 at byte {error.start} of the row") from error
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise BadRowError(f"not JSON (one object per line is expected): {problem}") from error
    except RecursionError as error:
        raise BadRowError("nested too deeply") from error
    except MemoryError as error:
        raise BadRowError("needs more memory than there is") from error
    except BadRowError:
        raise
    except ValueError as error:  # Python's bound against quadratic time
        raise BadRowError("a number has more than 4300 digits") from error
    if not isinstance(row, dict):
        raise BadRowError(f"not a JSON object but {type(row).__name__}")
    return row


def _text(row: Mapping[str, object], name: str, can_be_empty: bool = False) -> str:
    value = row.get(name)
    if value is None:
        if can_be_empty and name not in row:
            return ""
        raise BadRowError(f"lacks field {name!r}" if name not in row else f"field {name!r} is null")
    if not isinstance(value, str):
        raise BadRowError(f"field {name!r} is {type(value).__name__}, expected text")
    if _UNUSABLE.search(value):
        raise BadRowError(f"field {name!r} holds a NUL or half a surrogate pair")
    if not value.strip() and not can_be_empty:
        raise BadRowError(f"field {name!r} is empty")
    return value


def _references(row: Mapping[str, object], name: str) -> tuple[str, ...]:
    value = row.get(name)
    if not isinstance(value, list):
        return (_text(row, name),)
    if not value:
        raise BadRowError(f"field {name!r} is an empty list")
    return tuple(_text({name: item}, name) for item in value)


def _from_messages(row: Mapping[str, object]) -> Example:
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadRowError("field 'messages' must be a list of at least a question and an answer")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRowError("field 'messages' holds something that is no object")
        turns.append((_text(message, "role"), _text(message, "content")))
    if turns[-1][0] != "assistant" or turns[-2][0] != "user":
        raise BadRowError("field 'messages' must end with a user and then an assistant message")
    return Example("", turns[-2][1], "", (turns[-1][1],), tuple(turns[:-2]))


def parse_row(row: Mapping[str, object]) -> Example:
    """Returns the Example of a row, id possibly empty; raises ValueError with the reason."""
    if "messages" in row:
        example = _from_messages(row)
    elif "instruction" in row:
        context = _text(row, "input", can_be_empty=True)
        example = Example("", _text(row, "instruction"), context, _references(row, "output"))
    elif "prompt" in row:
        example = Example("", _text(row, "prompt"), "", _references(row, "response"))
    else:
        raise BadRowError("lacks field 'instruction' (or 'prompt', or 'messages')")
    given = row.get("id")
    if given is None:
        return example
    if isinstance(given, bool) or not isinstance(given, str | int) or str(given).strip() == "":
        raise BadRowError(f"field 'id' is {shown(given)}, expected text or a whole number")
    name = _text({"id": str(given)}, "id")
    return Example(name, example.prompt, example.context, example.references, example.history)
