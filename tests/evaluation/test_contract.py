"""What the adapter and the runner use of lmms-eval without its promise: one list, which fails when a name is gone."""

import inspect
import re

import pytest

pytestmark = pytest.mark.eval

# overridden by FusionChat -> of `lmms`
OVERRIDDEN = {"is_simple", "generate_until", "generate_until_multi_round", "loglikelihood"}
SET_BY_EVALUATOR = {"accelerator", "_rank", "_world_size"}
GUARDED = {"batch_sizes"}  # read behind `hasattr`
MODEL_ATTRIBUTES = ("_rank", "_world_size", "task_dict")  # set by `lmms.__init__`, which the adapter calls
MODEL_PROPERTIES = ("rank", "world_size")
TASK_METHODS = {
    "build_all_requests": {"limit", "rank", "world_size"},
    "get_config": set(),
    "set_config": {"key", "value"},
    "set_fewshot_seed": {"seed"},
    "process_results": set(),
}
TASK_PROPERTIES = ("instances", "eval_docs_no_media")
REQUEST_FIELDS = {"request_type", "arguments", "doc_id"}


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_the_adapter_overrides_what_there_is():
    from lmms_eval.api.model import lmms

    from fusion_hf.evaluation.lmms_adapter import FusionChat

    assert {name for name in vars(FusionChat) if not name.startswith("_") and hasattr(lmms, name)} == OVERRIDDEN
    assert lmms.__abstractmethods__ <= OVERRIDDEN


def test_the_evaluator_asks_for_nothing_else():
    from lmms_eval import evaluator

    from fusion_hf.evaluation.answering import RequestAnswerer
    from fusion_hf.evaluation.lmms_adapter import FusionChat

    asked = set(re.findall(r"\blm\.(\w+)", inspect.getsource(evaluator.evaluate)))
    adapter = FusionChat.around(RequestAnswerer(None, progress=False))
    has = {*dir(FusionChat), *vars(adapter)}
    assert asked - SET_BY_EVALUATOR - GUARDED - has == set()
    assert SET_BY_EVALUATOR - {"accelerator"} <= set(vars(adapter))


def test_attributes_of_models():
    from lmms_eval.api.model import lmms

    class Model(lmms):
        generate_until = generate_until_multi_round = loglikelihood = None

    model = Model()
    assert [name for name in (*MODEL_ATTRIBUTES, *MODEL_PROPERTIES) if not hasattr(model, name)] == []
    assert (model.rank, model.world_size, model.task_dict) == (0, 1, {})


def test_names_of_tasks():
    from lmms_eval.api.task import ConfigurableTask

    for name, names in TASK_METHODS.items():
        assert names <= parameters(getattr(ConfigurableTask, name)), name
    assert [name for name in TASK_PROPERTIES if not hasattr(ConfigurableTask, name)] == []


def test_names_of_requests():
    from lmms_eval.api.instance import Instance

    assert parameters(Instance) >= REQUEST_FIELDS
    assert isinstance(inspect.getattr_static(Instance, "args"), property)


def test_entry_points():
    from lmms_eval.evaluator import evaluate
    from lmms_eval.models.registry_v2 import ModelManifest
    from lmms_eval.tasks import TaskManager, get_task_dict

    assert parameters(evaluate) >= {"lm", "task_dict", "limit", "log_samples", "cli_args"}
    assert parameters(ModelManifest) >= {"model_id", "chat_class_path", "simple_class_path", "aliases"}
    assert parameters(TaskManager) >= {"include_path", "include_defaults", "model_name"}
    assert len(parameters(get_task_dict)) >= 3
