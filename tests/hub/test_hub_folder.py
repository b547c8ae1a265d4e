"""The folder alone: loaded in a fresh process where the package cannot be imported and the network is off."""

import json
from pathlib import Path

from tests.helpers.hub_folder import run

from fusion_hf import nano_path
from fusion_hf.hub.publishing import CODE_FOLDER, CODE_PATTERN

AUTO_CLASSES = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
remote = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(FOLDER, **remote)
assert config.model_type == "fusion" and "transformers_modules" in type(config).__module__
base = AutoModel.from_pretrained(FOLDER, **remote)
assert type(base).__name__ == "FusionModel"
processor = AutoProcessor.from_pretrained(FOLDER, **remote)
image_processor = AutoImageProcessor.from_pretrained(FOLDER, **remote)
assert type(image_processor).__name__ == "FusionImageProcessor"
tokenizer = AutoTokenizer.from_pretrained(FOLDER, **remote)
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
assert tokenizer.decode(inputs["input_ids"][0]) == processor.tokenizer.decode(inputs["input_ids"][0])
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(FOLDER, **remote)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
"""

PIPELINE = """
from transformers import pipeline
pipe = pipeline("image-text-to-text", model=FOLDER, trust_remote_code=True)
print(pipe(text=messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"].strip())
several = [messages, [{"role": "user", "content": [
    {"type": "image", "image": image}, {"type": "text", "text": "what shape is present?"}]}]]
for answer in pipe(text=several, max_new_tokens=4, return_full_text=False):
    print(answer[0]["generated_text"].strip())
"""

SAVE_AGAIN = """
from transformers import AutoModelForImageTextToText, AutoProcessor
target = sys.argv[2]
AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True).save_pretrained(target)
AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True).save_pretrained(target)
"""


def test_auto_classes(tmp_path: Path) -> None:
    assert run(AUTO_CLASSES, nano_path(), cache=tmp_path) == ["red", "red"]


def test_pipeline(tmp_path: Path) -> None:
    assert run(PIPELINE, nano_path(), cache=tmp_path) == ["red", "red", "circle"]


def test_saved_again_it_is_complete(tmp_path: Path) -> None:
    """Weights equal to the byte; code, processor and template files are all there; and it still answers."""
    copy = tmp_path / "copy"
    run(SAVE_AGAIN, nano_path(), copy, cache=tmp_path)
    original = Path(nano_path())
    assert (copy / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    missing = {path.name for path in original.iterdir() if path.is_file()} - {path.name for path in copy.iterdir()}
    assert missing <= {"README.md", "figures.json"}, missing
    assert run(PIPELINE, copy, cache=tmp_path) == ["red", "red", "circle"]


def test_folder_names_every_auto_class() -> None:
    config = json.loads((Path(nano_path()) / "config.json").read_text())
    expected = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert set(config["auto_map"]) >= expected
    processor = json.loads((Path(nano_path()) / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_fusion.FusionProcessor"


def test_the_code_files_are_the_packages() -> None:
    folder = Path(nano_path())
    names = sorted(path.name for path in CODE_FOLDER.glob(CODE_PATTERN))
    assert "modeling_fusion.py" in names
    assert names == sorted(path.name for path in folder.glob(CODE_PATTERN))
    for name in names:
        assert (folder / name).read_bytes() == (CODE_FOLDER / name).read_bytes(), name
