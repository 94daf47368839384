"""What run folders hold is told once, and both readers of the settings without effect agree where they must."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from specbench.cli.settings import SCHEMAS
from specbench.cli.verbs import VERBS
from specbench.runs import run_schema as schema
from specbench.runs.settings_without_effect import COMPARED, KNOWN_BY_CONTENT, OF_VERB, compared, without_effect

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = [
    file for package in ("specbench", "analysis", "experiments") for file in (REPOSITORY / package).rglob("*.py")
]


def test_every_kind_is_a_verb() -> None:
    assert set(schema.KINDS) <= set(VERBS)
    assert set(OF_VERB) <= set(VERBS)


@pytest.mark.parametrize("kind", KNOWN_BY_CONTENT)
def test_a_comparison_leaves_out_whatever_leaves_a_run_the_same(kind: str) -> None:
    """Two runs that the command line takes for the same one must never become two rows of a table."""
    for key in without_effect(kind):
        if not any(name.startswith(f"{key}.") for name in COMPARED):
            assert not compared(kind, key) and not compared(kind, f"{key}.below"), key
    assert compared(kind, "trainer.recipe.lr") and compared(kind, "rooted")
    assert not compared(kind, "seed.init")
    assert compared(kind, "target.target_layer_ids") and not compared(kind, "target.id")


def test_settings_that_are_known_by_content_are_settings() -> None:
    for kind, keys in KNOWN_BY_CONTENT.items():
        assert set(keys) <= set(SCHEMAS[kind].model_fields)
        assert all(not compared(kind, key) and compared(kind, f"{key}.layers") for key in keys)


@pytest.mark.parametrize("name", ["SCHEMA", "RECORDS_SCHEMA", "KINDS", "MARKS", "MIRRORED", "STEP", "TOKEN_CLASSES"])
def test_a_fact_of_the_schema_is_written_in_no_other_module(name: str) -> None:
    fact = getattr(schema, name)
    for file in SOURCES:
        if file == Path(schema.__file__):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            try:
                value = ast.literal_eval(node) if isinstance(node, ast.expr) else None
            except ValueError:
                continue
            assert value != fact, f"{file.relative_to(REPOSITORY)}, line {node.lineno} repeats schema.{name}"
