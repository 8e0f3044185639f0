"""What makes one artifact the draft of another: settings, vocabularies, and the executors joined."""

from __future__ import annotations

import os
from dataclasses import replace

from ..artifact.reader import Artifact
from ..spec.errors import TargetError, UsageError
from .config import RuntimeConfig
from .executors.drafting import Drafter
from .executors.stepped import AheadCapable, DraftCapable
from .protocol import Executor
from .tokenizer import Tokenizer


def with_draft(config: RuntimeConfig, draft: str | os.PathLike[str] | None = None) -> RuntimeConfig:
    """`config` with speculation by a draft model where `draft` or the settings name one. UsageError when it
    says otherwise."""
    draft = config.draft if draft is None else os.fspath(draft)
    if draft is None:
        return config
    if config.speculation == "ngram":
        raise UsageError(
            "runtime.draft_and_ngram",
            "A draft model is given, and speculation is set to ngram.",
            "Drafts come from one of the two.",
            "Leave one of them out.",
        )
    return replace(config, speculation="draft", draft=draft)


def draft_config(config: RuntimeConfig, target: Executor) -> RuntimeConfig:
    """Settings of the draft's own executor: as many sequences as the target runs, with a cache of its own
    size, since the target's number of bytes says nothing about the draft's."""
    caps = target.caps
    return replace(
        config,
        cache_bytes=0,
        max_requests=caps.max_rows,
        max_model_len=None,
        max_step_tokens=max(caps.max_tokens, caps.max_rows),
        speculation="none",
        draft=None,
    )


def check_vocabulary(target: Artifact, draft: Artifact) -> None:
    """UsageError when the two models do not mean the same by every token id."""
    sizes = [each.manifest.spec.vocab_size for each in (target, draft)]
    if sizes[0] != sizes[1]:
        raise _different(target, draft, f"One has {sizes[0]} tokens and the other {sizes[1]}")
    if not (target.manifest.of_kind("tokenizer") and draft.manifest.of_kind("tokenizer")):
        return
    ours, theirs = (Tokenizer.from_folder(each.tokenizer_folder) for each in (target, draft))
    for token_id in range(sizes[0]):
        if ours.id_to_token(token_id) != theirs.id_to_token(token_id):
            names = f"{ours.id_to_token(token_id)!r} and {theirs.id_to_token(token_id)!r}"
            raise _different(target, draft, f"Token {token_id} is {names}")


def attach_draft(target: Executor, draft: Executor) -> None:
    """`target` proposes with the model of `draft` from now on. TargetError when one of them cannot."""
    for each in (target, draft):
        if not isinstance(each, DraftCapable):
            raise TargetError(
                "target.no_drafts",
                f"The executor {each.caps.name} takes no part in speculation with a draft model.",
                "It has no model that others can run steps on.",
                "Use artifacts of the targets cpu, cuda or reference, or --speculation ngram.",
            )
    assert isinstance(target, DraftCapable)
    assert isinstance(draft, DraftCapable)
    ahead = target.model.ahead(draft.model) if isinstance(target.model, AheadCapable) else None
    target.attach(Drafter(draft.model, draft.caps, ahead))


def _different(target: Artifact, draft: Artifact, why: str) -> UsageError:
    return UsageError(
        "runtime.draft_vocabulary",
        f"{draft.path.name} cannot draft for {target.path.name}: their vocabularies differ.",
        f"{why}.",
        "Use a draft model with the same tokenizer.",
    )
