"""Calibration data from a file (text, JSON lines, chats) or from the built-in text, as token sequences.

Knows file formats and the tokenizer; what passes do with tokens is theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.tokenizer import Tokenizer
from ..spec.errors import LlmcError, UsageError
from ..spec.model import ModelSpec
from .calibration_text import built_in_documents

_SEQUENCE_TOKENS = 512
# Small models are through with more in no time, and learn from them.
_MOST_SEQUENCES, _MOST_FOR_SMALL, _SMALL_PARAMETERS = 64, 256, 32 << 20
_FEWEST_TOKENS = 512
# After these an interrupted compile can go on where it stopped, so what it found so far is kept.
_RESUMABLE = frozenset({"target.disk_full", "target.disk_space"})


class Document(NamedTuple):
    """One text to be tokenized; `formatted` when a chat template has put its special tokens in."""

    text: str
    formatted: bool


def read_sequences(path: Path, tokenizer: Tokenizer, spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Token sequences from the file at `path`: JSON lines by its suffix (.jsonl, .ndjson, .json), else text.

    Documents of a text file end at the tokenizer's EOS text, where there is any. They are joined, each with
    the tokens that the tokenizer puts around a text, and cut into sequences that fit the model. Raises
    UsageError for a file that cannot be read, is empty or too short, is not UTF-8, holds lines that are
    neither texts nor chats, chats without a chat template, or tokens that the model does not know.
    """
    length = min(_SEQUENCE_TOKENS, spec.max_context)
    sequences = _cut(read_documents(path, tokenizer), tokenizer, spec, length, path.name)
    num_tokens = sum(map(len, sequences))
    if num_tokens < _FEWEST_TOKENS:
        raise UsageError(
            "calibration.too_short",
            f"Calibration file {path.name} gives {num_tokens} tokens.",
            f"At least {_FEWEST_TOKENS} are needed to tell which inputs matter.",
            "Give a longer file, or leave --calibration out.",
        )
    return sequences


def built_in_sequences(tokenizer: Tokenizer, spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Token sequences from the built-in text. Raises UsageError for tokens that the model does not know."""
    documents = (Document(text, False) for text in built_in_documents())
    length = min(_SEQUENCE_TOKENS, spec.max_context)
    return _cut(documents, tokenizer, spec, length, "the built-in text")


@contextmanager
def results_folder(output: Path) -> Generator[Path]:
    """The hidden folder beside `output` where passes keep what they compute.

    It goes when the block ends or raises an error that running again would meet again; it stays when the
    process is interrupted or the disk was full, so that the same command takes up where it stopped: the error
    then says where it is. Where the compile cache has all of it, a full disk leaves nothing here.
    """
    folder = output.with_name(f".{output.name}.results")
    try:
        yield folder
    except LlmcError as error:
        if error.code in _RESUMABLE and _holds_alone(folder):
            kept = f"What was computed is kept in {str(folder)!r}, and the same command goes on from it."
            raise type(error)(error.code, error.what, error.why, f"{error.fix} {kept}") from error
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _holds_alone(folder: Path) -> bool:
    """Whether a file of `folder` has no second link: the compile cache links what it keeps."""
    return any(path.stat().st_nlink < 2 for path in folder.rglob("*") if path.is_file())


def read_documents(path: Path, tokenizer: Tokenizer) -> Iterable[Document]:
    """The documents of a file of text, or of JSON lines with texts or chats.

    Raises UsageError for a file that cannot be read, is empty or not UTF-8, and for lines of another form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"byte {error.start} is not UTF-8 text") from error
    except OSError as error:
        raise _unreadable(path, f"{error.strerror or error}") from error
    if not text.strip():
        raise _unreadable(path, "it is empty")
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return _json_documents(path, text, tokenizer)
    ends = [tokenizer.id_to_token(token) for token in tokenizer.eos_token_ids]
    parts = [text]
    for end in ends:
        parts = [piece for part in parts for piece in (part.split(end) if end else [part])]
    return (Document(part.strip(), False) for part in parts if part.strip())


def _json_documents(path: Path, text: str, tokenizer: Tokenizer) -> Iterable[Document]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except ValueError as error:
            raise _bad_line(path, number, f"it is not JSON ({error})") from error
        yield _document(path, number, value, tokenizer)


def _document(path: Path, number: int, value: Any, tokenizer: Tokenizer) -> Document:
    if isinstance(value, str):
        return Document(value, False)
    entry: Mapping[str, Any] = value if isinstance(value, dict) else {}
    if isinstance(entry.get("text"), str):
        return Document(entry["text"], False)
    messages = entry.get("messages", entry.get("conversations"))
    if not isinstance(messages, list):
        raise _bad_line(path, number, 'it has neither "text" nor "messages"')
    if not tokenizer.has_chat_template:
        raise UsageError(
            "calibration.no_chat_template",
            f"Calibration file {path.name} holds chats.",
            "The model has no chat template to write them with.",
            'Give plain text, or lines of the form {"text": "…"}.',
        )
    try:
        return Document(tokenizer.render_chat(messages, add_generation_prompt=False), True)
    except (LlmcError, TypeError, KeyError, AttributeError) as error:
        raise _bad_line(path, number, f"the chat template refuses it ({error})") from error


def _cut(
    documents: Iterable[Document], tokenizer: Tokenizer, spec: ModelSpec, length: int, source: str
) -> tuple[tuple[int, ...], ...]:
    """Sequences of `length` tokens, as many as are wanted; the last may be shorter."""
    tokens: list[int] = []
    small = spec.num_parameters <= _SMALL_PARAMETERS
    wanted = (_MOST_FOR_SMALL if small else _MOST_SEQUENCES) * length
    for document in documents:
        ids = tokenizer.encode(document.text, add_special_tokens=not document.formatted)
        end = tokenizer.eos_token_ids[:1] if not document.formatted else ()
        tokens.extend((*ids, *end))
        if len(tokens) >= wanted:
            break
    unknown = next((token for token in tokens if not 0 <= token < spec.vocab_size), None)
    if unknown is not None:
        raise UsageError(
            "calibration.unknown_token",
            f"Calibration from {source} gives token {unknown}.",
            f"The model knows {spec.vocab_size} tokens, so its tokenizer is of another model.",
            "Use the tokenizer that the model was trained with.",
        )
    starts = range(0, min(len(tokens), wanted), length)
    return tuple(tuple(tokens[start : start + length]) for start in starts)


def _unreadable(path: Path, why: str) -> UsageError:
    return UsageError(
        "calibration.unreadable",
        f"Calibration file {path} cannot be used.",
        f"The reason is: {why}.",
        "Give a file of text, or of JSON lines with texts or chats, in UTF-8.",
    )


def _bad_line(path: Path, number: int, why: str) -> UsageError:
    return UsageError(
        "calibration.bad_line",
        f"Line {number} of calibration file {path.name} cannot be used.",
        f"The reason is: {why}.",
        'Each line is a text, {"text": "…"}, or {"messages": [{"role": "…", "content": "…"}, …]}.',
    )
