"""Private names of other libraries that the package uses are listed here, and are there in the installed release."""

import argparse
import ast
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel, SiglipVisionConfig, Trainer

import fusion_hf

SOURCES = Path(fusion_hf.__file__).parent
NAMED_TUPLES = {"_asdict", "_fields", "_replace"}  # public in spite of their underscore
OTHERS = {
    "vllm": {"_executor", "_get_dummy_images", "_mark_language_model", "_mark_tower_model"}
}  # see tests/vllm/test_contract.py
PARSER = argparse.ArgumentParser()  # the help of `fusion-hf` is grouped and ends with examples
# what is read or called; what is overridden is in docs/architecture.md and in tests/train/test_trainer_contract.py
ATTRIBUTES: dict[str, Any] = {
    "_HelpAction": argparse,
    "_SubParsersAction": argparse,
    "_action_groups": PARSER,
    "_actions": PARSER,
    "_attn_implementation": SiglipVisionConfig(),  # which attention a part of the model uses
    "_choices_actions": PARSER.add_subparsers(),
    "_dynamo": torch,
    "_exit": os,
    "_forward_hooks": torch.nn.Module(),  # whoever watches a layer sees it computed as usual
    "_forward_pre_hooks": torch.nn.Module(),
    "_from_config": PreTrainedModel,  # a part with the attention of its configuration
    "_get_dataloader": Trainer,
    "_get_formatter": PARSER,
    "_get_output_dir": Trainer,
    "_group_actions": PARSER.add_argument_group(),
    "_linear_pointwise": torch.ops.mkldnn,  # use_onednn leaves a model as it is without it
    "_mutually_exclusive_groups": PARSER,
    "_name_or_path": SiglipVisionConfig(),  # where the model was loaded from, with the tokenizer beside it
    "_optionals": PARSER,
    "_update_model_kwargs_for_generation": GenerationMixin,  # a step of decoding, as transformers' own loop
    "_valid_auto_compile_criteria": GenerationMixin,
    "_version": torch.zeros(1),  # counts writes, so that features of former weights are forgotten
}
MODULES = {"torch._subclasses.fake_tensor", "torch.utils._python_dispatch", "torch.utils._pytree"}


def scan() -> tuple[set[str], set[str]]:
    """Private attributes that no file of the package defines, and private modules that are imported."""
    used: set[str] = set()
    defined: set[str] = set()
    modules: set[str] = set()
    for file in SOURCES.rglob("*.py"):
        if "checkpoints" in file.parts:
            continue
        left_out = OTHERS.get(file.relative_to(SOURCES).parts[0], set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                if isinstance(node.ctx, ast.Store):
                    defined.add(node.attr)
                elif node.attr not in left_out:
                    used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and any(map(is_private, (node.module or "").split("."))):
                modules.add(str(node.module))
    return used - defined - NAMED_TUPLES, modules


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_all_private_names_are_listed() -> None:
    assert scan() == (set(ATTRIBUTES), MODULES)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_name_is_there(name: str) -> None:
    assert hasattr(ATTRIBUTES[name], name)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_module_is_there(name: str) -> None:
    import_module(name)
