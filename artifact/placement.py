"""Where an artifact's bytes are, and which kernel each node of its program runs: read from the files, nothing
computed."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from .cpu import CPU_SOURCE
from .reader import Artifact
from .schema import Manifest

_FUNCTION = re.compile(r"^static void (\w+)\(const Step& .*?\n}$", re.MULTILINE | re.DOTALL)
_KERNEL = re.compile(r"^ +llmc::([\w:]+(?:<[\w:<>, ]+?>)?)\((?:tid|[ox] )", re.MULTILINE)
_STATEMENT = re.compile(r"^  // (.*)\n  (\w+)\(s, tid, nt", re.MULTILINE)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.(\w+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Weights of one part of the model: an embedding, a head, or all layers' `self_attn`, `mlp` and so on."""

    part: str
    num_tensors: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKernel:
    """One statement of a step: the node it is part of, the kernel it calls, and where a pass had a choice,
    what it took and what it compared that with."""

    node: str
    kernel: str
    choice: str
    reason: str


def weight_shares(artifact: Artifact) -> tuple[Share, ...]:
    """The stored weights by part of the model, largest first."""
    sizes: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    for _, views in artifact.weight_files():
        for name, view in views.items():
            part = _part(name)
            sizes[part] += view.data.nbytes
            counts[part] += 1
    found = [Share(part=part, num_tensors=counts[part], size_bytes=size) for part, size in sizes.items()]
    return tuple(sorted(found, key=lambda share: (-share.size_bytes, share.part)))


def node_kernels(artifact: Artifact) -> tuple[NodeKernel, ...]:
    """The statements of a step in order. On targets whose code is not a list of statements: the nodes at
    which a pass had a choice."""
    choices = _choices(artifact.manifest)
    if artifact.manifest.target.kind != "cpu":
        return tuple(
            NodeKernel(node=node, kernel="", choice=choice, reason=reason)
            for node, (choice, reason) in choices.items()
        )
    text = artifact.read_bytes(CPU_SOURCE).decode()
    kernels = {match[1]: _kernel(match[0]) for match in _FUNCTION.finditer(text)}
    found: list[NodeKernel] = []
    for comment, function in _STATEMENT.findall(text):
        node = comment.partition(":")[0]
        choice, reason = choices.get(node, ("", ""))
        found.append(NodeKernel(node=node, kernel=kernels[function], choice=choice, reason=reason))
    return tuple(found)


def _part(name: str) -> str:
    match = _LAYER.search(name)
    if match:
        return f"layers: {match[1]}"
    words = name.split("@")[0].removeprefix("model.").removeprefix("transformer.").split(".")
    return words[0]


def _kernel(function: str) -> str:
    """The kernels that a function of generated code calls; without one it is a loop of its own."""
    return ", ".join(dict.fromkeys(_KERNEL.findall(function))) or "a generated loop"


def _choices(manifest: Manifest) -> dict[str, tuple[str, str]]:
    return {
        decision.subject: (decision.choice, decision.reason)
        for record in manifest.history
        if record.name == "select_kernels"
        for decision in record.decisions
    }
