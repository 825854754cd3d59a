"""Conversations as data sets hold them, as text by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media._records import Record
from alphasmith.objectives.text import error_line

#: Fields that hold a list of messages.
_LISTS = ("messages", "conversations", "conversation")
#: Fields that hold a question, what it is about, and the answer.
_PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", "", "response"),
    ("prompt", "", "completion"),
    ("question", "", "answer"),
)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
#: Every field that may hold a part of a conversation.
FIELDS = (*_LISTS, *dict.fromkeys(name for pair in _PAIRS for name in pair if name))


@dataclass(frozen=True)
class Conversation:
    """Messages in the order they were said.

    Attributes:
        where: The record, for errors.
        messages: Role and text of each.
    """

    where: str
    messages: tuple[tuple[str, str], ...]

    def text(self, tokenizer: Any) -> str:
        """All of it, as the model was taught to read it.

        Raises:
            InputError: The tokenizer has no chat template, or that refuses it.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "data.column",
                f"{self.where} is a conversation, and the model's tokenizer has no chat template",
                "put chat_template.jinja into the model's folder, or name a field of plain text",
            )
        messages = [{"role": role, "content": content} for role, content in self.messages]
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # what a template raises is up to its author
            problem = f"the chat template refuses {self.where} ({error_line(error, 200)})"
            raise InputError("data.column", problem, "repair the conversation or the template") from error


def conversation_of(record: Record, column: str | None = None) -> Conversation | None:
    """The conversation a record holds; None where its fields are null.

    Args:
        record: The record.
        column: The field that holds the list of messages; None: by the names that data sets use.

    Raises:
        InputError: It is no conversation.
    """
    fields = record.fields
    name = column or next((name for name in _LISTS if name in fields), None)
    if name is not None:
        return None if fields[name] is None else Conversation(record.where, _messages(fields[name], record, name))
    asked = next(pair for pair in _PAIRS if pair[0] in fields and pair[2] in fields)
    question, about, answer = (fields.get(field) for field in asked)
    if question is None or answer is None:
        return None
    if not all(isinstance(part, str) for part in (question, answer, about or "")):
        raise InputError("data.column", f"{record.where} holds no text in {asked[0]!r}", "name the field that holds it")
    whole = f"{question}\n\n{about}" if about else question
    return Conversation(record.where, (("user", whole), ("assistant", answer)))


def is_conversation(record: Record) -> bool:
    """Whether its fields are named as those of conversations are."""
    names = record.fields
    return any(name in names for name in _LISTS) or any(ask in names and reply in names for ask, _, reply in _PAIRS)


def _messages(value: Any, record: Record, name: str) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for message in value if isinstance(value, (list, tuple)) else ():
        if not isinstance(message, Mapping):
            break
        role = message.get("role") or message.get("from")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "".join(part for part in parts if isinstance(part, str))
        if not isinstance(role, str) or not isinstance(content, (str, type(None))):
            break
        found.append((_ROLES.get(role.lower(), role.lower()), content or ""))
    if not found or len(found) < len(value):
        raise InputError(
            "data.column",
            f"{name!r} in {record.where} is no list of messages",
            "give a text, or messages with role and content (or from and value)",
        )
    return tuple(found)
