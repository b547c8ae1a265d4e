"""
The plugin against the files of a release of vLLM, which need not be importable here: some are for CUDA alone.

It reads the installed release, or the one that `FUSION_HF_VLLM_SOURCES` names: a wheel, or a folder with its files.
"""

import ast
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.helpers.python_sources import (
    FUNCTIONS,
    Definition,
    Parameters,
    Sources,
    is_static,
    parameters,
    parse,
    statements,
)
from tests.vllm.test_contract import OVERRIDDEN, USED

import fusion_hf

pytestmark = pytest.mark.vllm

PLUGIN = sorted((Path(fusion_hf.__file__).parent / "vllm").glob("*.py"))
VARIABLE = "FUSION_HF_VLLM_SOURCES"
# attributes that the plugin reads or sets, whose class no file of ours names
FIELDS = {
    "vllm.config:VllmConfig": {
        "attention_config",
        "cache_config",
        "compilation_config",
        "kernel_config",
        "kv_transfer_config",
        "model_config",
        "scheduler_config",
        "speculative_config",
    },
    "vllm.config:ModelConfig": {
        "dtype",
        "enforce_eager",
        "get_vocab_size",
        "hf_config",
        "max_model_len",
        "model_arch_config",
        "tokenizer_mode",
        "try_get_generation_config",
    },
    "vllm.config:SchedulerConfig": {
        "async_scheduling",
        "enable_chunked_prefill",
        "long_prefill_token_threshold",
        "max_num_batched_tokens",
    },
    "vllm.config:CacheConfig": {"cache_dtype", "enable_prefix_caching"},
    "vllm.config:AttentionConfig": {"backend", "backend_per_kind"},
    "vllm.config:CompilationConfig": {"cudagraph_mode", "mode"},
    "vllm.config:CompilationMode": {"DYNAMO_TRACE_ONCE", "NONE", "VLLM_COMPILE"},
    "vllm.config.compilation:CUDAGraphMode": {"FULL_DECODE_ONLY", "NONE"},
    "vllm.config.kernel:KernelConfig": {"enable_jit_warmup"},
    "vllm.forward_context:ForwardContext": {"attn_metadata"},
    "vllm.multimodal.media:MediaWithBytes": {"original_bytes"},
    "vllm.renderers.params:ChatParams": {
        "chat_template",
        "chat_template_kwargs",
        "media_io_kwargs",
        "mm_processor_kwargs",
    },
    "vllm.renderers.hf:HfRenderer": {"model_config"},
}
METADATA = {"max_query_len", "query_start_loc", "seq_lens"}
LAYERS = {
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
}
MODEL_INPUTS = ["input_ids", "positions", "intermediate_tensors", "inputs_embeds"]
MODELS = "vllm.model_executor.models"


@pytest.fixture(scope="module")
def sources() -> Sources:
    if VARIABLE in os.environ:
        return Sources.at(os.environ[VARIABLE])
    installed = find_spec("vllm")
    assert installed is not None, f"Install vLLM, or name a release's files in {VARIABLE}."
    (folder,) = installed.submodule_search_locations
    return Sources(Path(folder).parent)


def plugin_file(stem: str) -> Path:
    return next(file for file in PLUGIN if file.stem == stem)


def imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield node


def names_of(file: Path, sources: Sources) -> dict[str, Definition]:
    """What a file of the plugin imports of vLLM, by the names that it has there."""
    found = {}
    for statement in imports(parse(file)):
        for alias in statement.names:
            definition = find(sources, statement.module or "", alias.name)
            if definition is not None:
                found[alias.asname or alias.name] = definition
    return found


def find(sources: Sources, module: str, name: str) -> Definition | None:
    if module == "vllm":  # whose names are looked up in a table when they are first asked for
        table = ast.literal_eval(sources.value("vllm", "MODULE_ATTRS"))
        if name in table:
            path, _, attribute = table[name].partition(":")
            return sources.find(f"vllm{path}", attribute)
    return sources.find(module, name)


@pytest.mark.parametrize("file", PLUGIN, ids=lambda file: file.stem)
def test_what_is_imported_is_there(file: Path, sources: Sources):
    """Of two ways to import a name, for two releases, one is enough."""
    tree, found = parse(file), names_of(file, sources)
    optional = {
        id(node)
        for attempt in ast.walk(tree)
        if isinstance(attempt, ast.Try)
        for node in statements([attempt])
        if isinstance(node, ast.ImportFrom)
    }
    for statement in imports(tree):
        for alias in statement.names:
            name = alias.asname or alias.name
            is_there = name in found if id(statement) in optional else find(sources, statement.module, alias.name)
            assert is_there, f"{statement.module} has no {alias.name}"


def vllm_classes(file: Path, sources: Sources) -> Iterator[tuple[ast.ClassDef, dict[str, Definition]]]:
    """The plugin's classes, with what they have of vLLM's."""
    known = names_of(file, sources)
    for cls in ast.walk(parse(file)):
        if isinstance(cls, ast.ClassDef):
            bases = [base.value if isinstance(base, ast.Subscript) else base for base in cls.bases]
            above = [known[base.id] for base in bases if isinstance(base, ast.Name) and base.id in known]
            members: dict[str, Definition] = {}
            for base in above:
                if isinstance(base.node, ast.ClassDef):
                    members = sources.members(base) | members
            if members:
                yield cls, members


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_defined_anew_or_used_is_still_there(name: str, sources: Sources):
    file, _, cls = name.partition(":")
    above = {node.name: members for node, members in vllm_classes(plugin_file(file), sources)}[cls]
    assert OVERRIDDEN[name] | USED.get(name, set()) <= set(above)


@pytest.mark.parametrize("file", PLUGIN, ids=lambda file: file.stem)
def test_what_is_defined_anew_takes_the_same_arguments(file: Path, sources: Sources):
    for cls, members in vllm_classes(file, sources):
        for ours in cls.body:
            if not isinstance(ours, FUNCTIONS) or ours.name not in members or ours.name == "__init__":
                continue
            theirs = members[ours.name].node
            own, other = parameters(ours, not is_static(ours)), parameters(theirs, not is_static(theirs))
            assert (own.variable and own.keywords) or own.names == other.names, (cls.name, ours.name, other.names)


def callee(call: ast.Call, known: dict[str, Definition], sources: Sources) -> Parameters | None:
    """What a call of an imported function, or of something that an imported name has, may give."""
    function = call.func
    if isinstance(function, ast.Name) and function.id in known:
        target = known[function.id]
        return parameters(target.node, False) if isinstance(target.node, FUNCTIONS) else None
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return None
    if function.value.id not in known:
        return None
    owner = known[function.value.id]
    if isinstance(owner.node, (ast.Assign, ast.AnnAssign)) and isinstance(owner.node.value, ast.Call):
        owner = sources.find(owner.module, owner.node.value.func.id)  # an instance, of this class
    if owner is None or not isinstance(owner.node, ast.ClassDef):
        return None
    members = sources.members(owner)
    assert function.attr in members, f"{function.value.id} has no {function.attr}"
    method = members[function.attr].node
    return parameters(method, not is_static(method)) if isinstance(method, FUNCTIONS) else None


@pytest.mark.parametrize("file", PLUGIN, ids=lambda file: file.stem)
def test_what_is_called_takes_what_it_is_given(file: Path, sources: Sources):
    known = names_of(file, sources)
    calls = [call for call in ast.walk(parse(file)) if isinstance(call, ast.Call)]
    for call in calls:
        takes = callee(call, known, sources)
        assert takes is None or not takes.refuse(call), f"{ast.unparse(call)}: {takes.refuse(call)}"


@pytest.mark.parametrize("file", PLUGIN, ids=lambda file: file.stem)
def test_inherited_methods_take_what_they_are_given(file: Path, sources: Sources):
    """Those that the plugin's classes call on themselves or above themselves."""
    for cls, members in vllm_classes(file, sources):
        own = {statement.name for statement in cls.body if isinstance(statement, FUNCTIONS)}
        for call in ast.walk(cls):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            above = ast.unparse(call.func.value) == "super()"
            is_self = ast.unparse(call.func.value) == "self" and call.func.attr not in own
            if not above and not (is_self and call.func.attr in members):
                continue
            assert call.func.attr in members or call.func.attr == "__init__", (cls.name, call.func.attr)
            method = members.get(call.func.attr)
            if method is not None and isinstance(method.node, FUNCTIONS):
                problem = parameters(method.node, not is_static(method.node)).refuse(call)
                assert problem is None, f"{cls.name}: {ast.unparse(call)}: {problem}"


@pytest.mark.parametrize("name", FIELDS)
def test_attributes_are_there(name: str, sources: Sources):
    module, _, cls = name.partition(":")
    found = sources.find(module, cls)
    assert found is not None
    inside = {
        node.attr
        for node in ast.walk(found.node)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    bases = [Definition(found.module, found.node), *filter(None, map_bases(found, sources))]
    for base in bases:
        inside |= {
            node.attr
            for node in ast.walk(base.node)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
    assert FIELDS[name] <= inside | set(sources.members(found))


def map_bases(cls: Definition, sources: Sources) -> list[Definition | None]:
    plain = [base.value if isinstance(base, ast.Subscript) else base for base in cls.node.bases]
    return [sources.find(cls.module, base.id) for base in plain if isinstance(base, ast.Name)]


def test_attention_that_is_allowed_says_where_requests_begin(sources: Sources):
    settings = parse(plugin_file("settings"))
    backends = next(
        ast.literal_eval(node.value)
        for node in settings.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BACKENDS"
    )
    kinds = sources.members(sources.find("vllm.v1.attention.backends.registry", "AttentionBackendEnum"))
    for name in backends:
        module, _, _ = ast.literal_eval(kinds[name].node.value).rpartition(".")
        metadata = [
            Definition(module, node)
            for node in sources.module(module).body
            if isinstance(node, ast.ClassDef) and node.name.endswith("Metadata")
        ]
        (found,) = (each for each in metadata if set(sources.members(each)) >= METADATA)
        assert found


def test_language_models_have_the_layers_that_the_plugin_runs(sources: Sources):
    table = sources.value(f"{MODELS}.registry", "_TEXT_GENERATION_MODELS")
    known = {key.value for key in table.keys if isinstance(key, ast.Constant)}
    modeling = parse(plugin_file("modeling"))
    backbones = next(
        ast.literal_eval(node.value)
        for node in modeling.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BACKBONES"
    )
    assert set(backbones.values()) <= known
    for module, name in LAYERS.items():
        forward = sources.members(sources.find(f"{MODELS}.{module}", name))["forward"].node
        taken = parameters(forward, True)
        assert taken.names[:3] == ["positions", "hidden_states", "residual"]
        assert taken.required <= {"positions", "hidden_states", "residual"}
        model = sources.members(sources.find(f"{MODELS}.{module}", name.replace("DecoderLayer", "Model")))
        assert parameters(model["forward"].node, True).names[:4] == MODEL_INPUTS
        ends = [node.value for node in ast.walk(forward) if isinstance(node, ast.Return)]
        assert {ast.unparse(value) for value in ends} <= {"(hidden_states, residual)", "hidden_states, residual"}


def test_the_tokenizer_that_is_named_is_there(sources: Sources):
    register = parse(plugin_file("__init__"))
    named = [
        (call.args[1].value, call.args[2].value)
        for call in ast.walk(register)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "TokenizerRegistry.register"
    ]
    assert named
    for module, name in named:
        assert sources.find(module, name), f"{module} has no {name}"


def test_the_server_takes_the_flags(sources: Sources):
    server = parse(plugin_file("api_server"))
    (values,) = (
        node.value
        for node in ast.walk(server)
        if isinstance(node, ast.AnnAssign)
        and ast.unparse(node.target) == "values"
        and isinstance(node.value, ast.Dict)
    )
    settings = parse(plugin_file("settings"))
    (engine,) = (
        ast.literal_eval(node.value)
        for node in ast.walk(settings)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ENGINE_ARGUMENTS"
    )
    parser = names_of(plugin_file("api_server"), sources)["make_arg_parser"]
    known = {
        name
        for module, cls in (("vllm.engine.arg_utils", "AsyncEngineArgs"), (parser.module, "FrontendArgs"))
        for name in sources.members(sources.find(module, cls))
    }
    flags = {ast.literal_eval(key) for key in values.keys} | set(engine) | {"trust-request-mm-kwargs"}
    assert {flag.replace("-", "_") for flag in flags} <= known


def test_what_a_release_changes_is_noticed(tmp_path: Path):
    package = tmp_path / "library"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import *\nfrom .inner import Base as Other\n")
    (package / "inner.py").write_text(
        "class Base:\n    def method(self, first, *, named): ...\n\nclass Child(Base): ...\n"
    )
    library = Sources(tmp_path)
    assert library.find("library", "Child") == library.find("library.inner", "Child")
    assert library.find("library", "Other").node.name == "Base"
    assert library.find("library", "Lost") is None
    method = library.members(library.find("library", "Child"))["method"].node
    for call, problem in {
        "method(1, named=2)": None,
        "method(*both)": None,
        "method(1, 2, named=3)": "2 arguments by place, of 1",
        "method(1, named=2, other=3)": "unknown: other",
        "method(1)": "missing: named",
    }.items():
        assert parameters(method, True).refuse(ast.parse(call).body[0].value) == problem
