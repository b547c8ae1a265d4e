"""`fusion-hf ask` imports what it uses, and what it leaves out changes no number."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model
from transformers.utils.import_utils import define_import_structure

from fusion_hf.cli.lean_imports import ABSENT, KNOWN
from fusion_hf.cli.model_list import list_models
from fusion_hf.model import modeling_fusion_decoder
from fusion_hf.model.modeling_fusion_decoder import DECODER_LAYERS, FUSION_LAYERS, decoder_layer

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "docs" / "assets" / "red_circle.png"
# `fusion-nano` is a Llama
UNUSED = (
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy"),
    *("scipy.optimize", "sklearn", "pandas", "datasets", "peft", "gradio", "torchvision"),
    *(f"transformers.models.{name}.modeling_{name}" for name in DECODER_LAYERS if name != "llama"),
    "transformers.trainer",
)
ASK = """
import json, sys
from fusion_hf.cli import main
status = main()
print(json.dumps([status, sorted(sys.modules)]))
"""
# logits of tiny models, and buffers, which are computed and not loaded
COMPUTE = """
import json, sys
from pathlib import Path
from fusion_hf.cli.lean_imports import lean_imports
folder = Path(sys.argv[1])
with lean_imports(True):
    import torch
    from fusion_hf import FusionForConditionalGeneration
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    models = {name: FusionForConditionalGeneration.from_pretrained(folder / name) for name in names}
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
from safetensors.torch import load_file, save_file
for name, model in models.items():
    inputs = load_file(folder / name / "inputs.st")
    with torch.inference_mode():
        found = {"logits": model.eval()(**inputs, query_len=4).logits}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    save_file(found, folder / name / "found.st")
"""


def _run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ask_imports_what_it_uses():
    """One pass over a model of 28 MB, in a process of its own."""
    answer, modules = _run(ASK, "ask", IMAGE, "what color is the circle?", "--max-new-tokens", 8).splitlines()
    status, imported = json.loads(modules)
    assert status == 0 and answer == "red"
    assert "transformers.models.llama.modeling_llama" in imported
    assert sorted(set(UNUSED) & set(imported)) == []


def _compared(folder: Path, changes: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Logits and buffers of models loaded with lean imports are those of models made here, bit for bit."""
    from safetensors.torch import save_file

    models = {}
    for name, (backbone, text) in changes.items():
        model = tiny_model(tiny_config(backbone, text=text))
        model.save_pretrained(folder / name)
        inputs = make_inputs(model.config, [Sample(seed=3)])
        assert inputs.pop("query_len") == 4
        save_file(inputs, folder / name / "inputs.st")
        models[name] = (model, inputs)
    _run(COMPUTE, folder)
    for name, (model, inputs) in models.items():
        found = load_file(folder / name / "found.st")
        with torch.inference_mode():
            assert torch.equal(model(**inputs, query_len=4).logits, found.pop("logits")), name
        buffers = dict(model.named_buffers())
        assert buffers.keys() == found.keys(), name
        assert all(torch.equal(buffers[key], value) for key, value in found.items()), name


@pytest.mark.slow
def test_numbers_of_all_backbones(tmp_path: Path):
    half = [1.0, 2.0, 3.0, 4.0]  # of a head of 8
    long_rope = {"rope_type": "longrope", "short_factor": half, "long_factor": half, "rope_theta": 10000.0}
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    texts: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in BACKBONES}
    texts["long"] = ("phi3", {"rope_parameters": long_rope, "original_max_position_embeddings": 256})
    texts["scaled"] = ("llama", {"rope_parameters": llama3})
    _compared(tmp_path, texts)


@pytest.mark.parametrize(("place", "prefix"), [("", "models"), ("__init__.py", None)])
def test_kept_list_of_models(tmp_path: Path, place: str, prefix: str | None):
    """From a file as by reading all models' files once more; anything else is left to transformers."""
    path = Path(transformers.__file__).parent / "models" / place
    listed = _models(define_import_structure(path, prefix), prefix)
    calls = []

    def define(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return define_import_structure(*args, **kwargs)

    for _ in range(2):
        assert _models(list_models(define, path, prefix, tmp_path), prefix) == listed
        assert len(calls) == 1
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    changes = {"version": "5.0.0", "changed": 1, "structure": [[["torch"], ["albert"]]]}
    for damaged in (*(json.dumps(content | {key: value}) for key, value in changes.items()), "[]", "{", "\0" * 100):
        file.write_text(damaged)
        assert _models(list_models(define, path, prefix, tmp_path), prefix) == listed, damaged
        assert len(calls) == 2, damaged
        calls.pop()
        assert json.loads(file.read_text()) == content
    (tmp_path / "no folder").touch()
    assert _models(list_models(define, path, prefix, tmp_path / "no folder"), prefix) == listed
    albert = path.parent / "albert" if place else path / "albert"
    assert list_models(define_import_structure, albert, None, tmp_path) == define_import_structure(albert, None)


def test_kept_list_is_used(tmp_path: Path):
    """In a process that finds the list, transformers reads no model's file for it; afterwards it is as it was."""
    script = """
import sys
from pathlib import Path
from fusion_hf.cli.model_list import kept_model_list
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
with kept_model_list(Path(sys.argv[1])):
    import transformers
print(sum("/models/" in name and name.endswith(".py") for name in opened))
print(transformers.utils.import_utils.define_import_structure.__name__, transformers.LlamaConfig().model_type)
"""
    counts = [_run(script, tmp_path).splitlines() for _ in range(2)]
    assert int(counts[0][0]) > 1000 and int(counts[1][0]) < 10
    assert counts[0][1] == counts[1][1] == "define_import_structure llama"


def _models(structure: dict[Any, dict[str, Any]], prefix: str | None) -> dict[Any, dict[str, Any]]:
    """Without backends that no model needs, and without what transformers adds to the list once it has it."""
    start = "" if prefix is None else f"{prefix}."
    own = {
        backends: {name: names for name, names in modules.items() if name.startswith(start)}
        for backends, modules in structure.items()
    }
    return {backends: modules for backends, modules in own.items() if modules}


def test_submodules_of_the_compiler_can_be_imported():
    """As torchao and Triton do while transformers is imported: the compiler comes instead of its stand-in."""
    script = """
import sys
from fusion_hf.cli.lean_imports import lean_imports
with lean_imports(True):
    from torch._dynamo.utils import warn_once
    import torch._dynamo.config
import torch
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"] and torch._dynamo.utils.warn_once is warn_once
print(torch._dynamo.utils.__spec__.name, type(torch._dynamo).__name__, torch._dynamo.is_compiling())
"""
    assert _run(script) == "torch._dynamo.utils module False\n"


def test_names_are_those_of_the_libraries():
    """A release that renames one would only be slower to start; here it is noticed."""
    for name, known in KNOWN.items():
        module = __import__(name, fromlist=["_"])
        assert all(hasattr(module, each) for each in known), name
    for name in ABSENT:
        assert hasattr(transformers.utils, name) and hasattr(transformers.utils.import_utils, name)


@pytest.mark.parametrize("model_type", DECODER_LAYERS)
def test_layers_have_their_names(model_type: str):
    layer = decoder_layer(model_type)
    assert layer is decoder_layer(model_type) is getattr(modeling_fusion_decoder, layer.__name__)
    assert FUSION_LAYERS[layer.__name__] == model_type
    assert pickle.loads(pickle.dumps(layer)) is layer  # noqa: S301


def test_a_class_that_is_none_of_them():
    with pytest.raises(AttributeError, match="FusionGemmaDecoderLayer"):
        modeling_fusion_decoder.FusionGemmaDecoderLayer  # noqa: B018
