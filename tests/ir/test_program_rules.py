"""Programs run, print, survive serialisation, and are refused by the verifier when they break a rule."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from llmc.ir.infer import infer, symbol_hints
from llmc.ir.interpret import interpret, last_uses
from llmc.ir.printer import print_program
from llmc.ir.program import GraphInput
from llmc.ir.serialize import graph_from_data, graph_to_data
from llmc.ir.verify import verify
from llmc.ir.vocabulary import operator_name, operator_named
from llmc.ir.weights import Constant
from llmc.spec.errors import ArtifactError, InternalError

llmc, aten = torch.ops.llmc, torch.ops.aten


def inputs(tokens=5):
    return {
        "input_ids": torch.arange(tokens) % 11,
        "positions": torch.arange(tokens),
        "out_rows": torch.tensor([0, tokens - 1]),
    }


def run(program):
    return interpret(program.graph, inputs(), program.weights.evaluate)


# -- the verifier -------------------------------------------------------------------------------------


def edited(program, edit, clear=False):
    """`program` with its graph changed by `edit(graph, named nodes)` and inferred again."""
    graph = program.copy_graph()
    edit(graph, {node.name: node for node in graph.nodes})
    if clear:
        for node in graph.nodes:
            node.meta.clear()
    changed = program.replace(graph=graph)
    infer(changed)
    return changed


def rejects(program, reason):
    with pytest.raises(InternalError) as caught:
        verify(program)
    assert caught.value.code == "ir.invalid"
    assert reason in caught.value.why


def test_a_good_program_passes(tiny):
    verify(tiny)


def test_inputs_must_be_the_placeholders(tiny):
    rejects(
        tiny.replace(inputs=tiny.inputs[:2]), "placeholders ['input_ids', 'positions', 'out_rows'] are not"
    )


def test_symbols_must_stay_symbols(tiny):
    changed = tiny.replace(graph=tiny.copy_graph())
    next(iter(changed.graph.nodes)).meta["val"] = torch.empty(13, dtype=torch.int64, device="meta")
    rejects(changed, "dimension T of input 'input_ids' was specialised to 13")


def test_operators_must_be_listed(tiny):
    def edit(graph, nodes):
        table = nodes["embedding_default"]
        with graph.inserting_after(table):
            foreign = graph.call_function(aten.relu_.default, (table,))
        foreign.meta["val"] = table.meta["val"]

    rejects(edited(tiny, edit), "calls aten.relu_.default, which is not in the vocabulary")


def test_methods_are_not_operators(tiny):
    def edit(graph, nodes):
        with graph.inserting_after(nodes["table"]):
            graph.call_method("relu", (nodes["table"],)).meta["val"] = nodes["table"].meta["val"]

    rejects(edited(tiny, edit), "is a call_method")


def test_weights_must_be_in_the_store(tiny):
    rejects(tiny.replace(weights=tiny.weights.restricted_to([])), "weight 'table' is not in the store")


def test_weights_have_one_reader(tiny):
    def edit(graph, nodes):
        with graph.inserting_after(nodes["table"]):
            graph.get_attr("table")

    rejects(edited(tiny, edit), "weight 'table' is read by 2 nodes")


@pytest.mark.parametrize("value", [torch.zeros(11, 9), torch.zeros(11, 8, dtype=torch.float16)])
def test_weights_are_what_their_nodes_say(tiny, value):
    changed = tiny.replace(weights=tiny.weights.with_entries({"table": Constant(value)}))
    rejects(changed, "but its node says")


def test_every_node_has_a_value(tiny):
    changed = tiny.replace(graph=tiny.copy_graph())
    del list(changed.graph.nodes)[-2].meta["val"]
    rejects(changed, "has no inferred value")


def test_there_is_one_attention_a_layer(tiny):
    rejects(tiny.replace(spec=replace(tiny.spec, attention=())), "1 attention nodes for 0 attention layers")


def test_logits_are_as_wide_as_the_vocabulary(tiny):
    rejects(tiny.replace(spec=replace(tiny.spec, vocab_size=12)), "not [L, 12]")


def test_there_is_one_result(tiny):
    def edit(graph, nodes):
        nodes["output"].args = ((nodes["linear_default"], nodes["linear_default"]),)

    rejects(edited(tiny, edit), "exactly one value")


def test_the_count_of_further_problems_is_told(tiny):
    broken = tiny.replace(inputs=tiny.inputs[:2], spec=replace(tiny.spec, attention=()))
    rejects(broken, "(and 1 more)")


# -- inference ----------------------------------------------------------------------------------------


def test_inference_names_the_node_that_refuses(tiny):
    def edit(graph, nodes):
        linear = nodes["linear_default"]
        with graph.inserting_after(linear):
            bad = graph.call_function(aten.add.Tensor, (linear, nodes["table"]))
        linear.replace_all_uses_with(bad, delete_user_cb=lambda user: user is not bad)

    with pytest.raises(InternalError, match=r"Node 'add_tensor' .* does not accept its inputs"):
        edited(tiny, edit)


def test_inference_keeps_what_is_known(tiny):
    before = [node.meta["val"] for node in tiny.graph.nodes if node.op != "output"]
    infer(tiny)
    assert all(node.meta["val"] is value for node, value in zip(tiny.graph.nodes, before, strict=False))


def test_no_two_symbols_share_a_hint():
    many = tuple(GraphInput(name=str(i), shape=(f"B{i}", "T"), dtype="int64") for i in range(60))
    hints = symbol_hints(many)
    assert len(set(hints.values())) == len(hints) == 63


# -- running ------------------------------------------------------------------------------------------


def test_observers_see_every_value_and_values_die_after_their_last_use(tiny):
    seen = []
    result = interpret(
        tiny.graph, inputs(), tiny.weights.evaluate, lambda node, value: seen.append(node.name)
    )
    assert seen == [node.name for node in tiny.graph.nodes if node.op != "output"]
    assert result.shape == (2, 11)
    dying = last_uses(tiny.graph)
    nodes = {node.name: node for node in tiny.graph.nodes}
    assert nodes["table"] in dying[nodes["linear_default"]]
    assert sum(len(dead) for dead in dying.values()) == len(nodes) - 2


# -- text and data ------------------------------------------------------------------------------------


def test_programs_print_as_text(tiny, golden):
    golden(print_program(tiny), "tiny.txt")


def test_graphs_survive_json(tiny):
    data = json.loads(json.dumps(graph_to_data(tiny.graph)))
    back = tiny.replace(graph=graph_from_data(data))
    infer(back)
    verify(back)
    assert print_program(back) == print_program(tiny)
    assert graph_to_data(back.graph) == data
    assert torch.equal(run(back), run(tiny))


def test_every_kind_of_argument_survives(tiny):
    arguments = (
        None, True, 3, 2.5, float("inf"), float("-inf"), "text", [1, [2, None]],
        torch.bfloat16, torch.device("cpu"), torch.strided, torch.contiguous_format,
        slice(None, 3, None),
    )  # fmt: skip
    graph = tiny.copy_graph()
    first = next(iter(graph.nodes))
    with graph.inserting_after(first):
        node = graph.call_function(aten.add.Tensor, (first, *arguments), {"alpha": float("inf")})
    node.name = "strange"
    back = graph_from_data(json.loads(json.dumps(graph_to_data(graph))))
    found = next(node for node in back.nodes if node.name == "strange")
    # fx keeps lists as its own immutable kind
    assert list(found.args[1:]) == list(arguments)
    assert found.kwargs == {"alpha": float("inf")}


def test_what_is_no_data_is_refused(tiny):
    graph = tiny.copy_graph()
    first = next(iter(graph.nodes))
    with graph.inserting_after(first):
        graph.call_function(aten.add.Tensor, (first, 1 + 2j))
    with pytest.raises(TypeError, match="complex cannot be an argument"):
        graph_to_data(graph)


def node_data(**changes):
    base = {"name": "n", "op": "call_function", "target": "llmc.softcap.default", "args": [], "kwargs": {}}
    return [base | changes]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (node_data(target="os.system"), "artifact.operator"),
        (node_data(target="aten.relu_.default"), "artifact.operator"),
        (node_data(target="aten.no_such_operator.default"), "artifact.operator"),
        (node_data(args=[{"node": "later"}]), "artifact.program"),
        (node_data(args=[{"pickle": "x"}]), "artifact.program"),
        (node_data(args=[{"dtype": "Tensor"}]), "artifact.program"),
    ],
)
def test_damaged_graphs_are_refused(data, code):
    with pytest.raises(ArtifactError) as caught:
        graph_from_data(data)
    assert caught.value.code == code


def test_operator_names_are_stable():
    for name in ("llmc.rope.default", "aten.add.Tensor", "operator.getitem"):
        assert operator_name(operator_named(name)) == name
    with pytest.raises(ValueError, match="not in the vocabulary"):
        operator_name(torch.nn.functional.relu)
