"""The table of update rules that `tiglon plan` shows."""

from launch.load_config import build_config
from launch.planner.rules import rule_lines
from model.sizes import parameter_counts


def test_every_parameter_stands_in_one_line():
    rules = {"*o_proj*": {"rule": "adamw", "weight_decay": 0.5}, "embedding": {"rows": "seen"}}
    config = build_config({"model": {"tie_word_embeddings": False}, "optimizer": {"rules": rules}})
    lines = rule_lines(config)
    assert sum(line.elements for line in lines) == parameter_counts(config.model)["total"]
    found = {(line.kind, line.pattern): line for line in lines}
    assert set(found) == {("embedding", "embedding"), ("gain", ""), ("head", ""), ("matrix", ""), ("matrix", "*o_proj*")}
    embedding, matrix, gain = found["embedding", "embedding"], found["matrix", "*o_proj*"], found["gain", ""]
    assert (embedding.rule, embedding.rows, embedding.relative_to) == ("tiger", "seen", "RMS")
    assert (matrix.rule, matrix.tensors, matrix.weight_decay) == ("adamw", config.model.num_hidden_layers, 0.5)
    assert matrix.states == ("momentum", "second_moment") and matrix.relative_to == ""
    assert (gain.learning_rate, gain.weight_decay) == (0.5e-3, 0.0)
