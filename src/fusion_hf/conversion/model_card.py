"""The model card: `README.md` of a Hub folder. The same input gives the same text; it holds no date and no path."""

from dataclasses import dataclass

import torch
from huggingface_hub import ModelCardData

from fusion_hf.common.values import dtype_name
from fusion_hf.hub.family import DATASETS, LAST_STAGE, PAPER, REPOSITORY, FamilyMember, find_member
from fusion_hf.model.compatibility_fusion import TESTED
from fusion_hf.model.configuration_fusion import FusionConfig

UNTRAINED_TAG = "untrained"
HUB = "https://huggingface.co/"
BENCHMARKS_PER_LINE = 12

CITATION = """\
```bibtex
@article{liu2025fusion,
  title   = {FUSION: Fully Integration of Vision-Language Representations for Deep Cross-Modal Understanding},
  author  = {Liu, Zheng and Liu, Mengjie and Chen, Jingzhou and Xu, Jingwei and Cui, Bin and He, Conghui and
             Zhang, Wentao},
  journal = {arXiv preprint arXiv:2504.09925},
  year    = {2025}
}
```
"""

USAGE = """\
The code is in this folder: transformers {releases} run it with `trust_remote_code=True`. A newer release warns once
that it was not tested. With the package `fusion_hf` installed, `import fusion_hf` makes the flag unnecessary.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model_id = "{model_id}"
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(model_id, trust_remote_code=True)

messages = [
    {{
        "role": "user",
        "content": [
            {{"type": "image", "path": "image.jpg"}},
            {{"type": "text", "text": "What is in the image?"}},
        ],
    }}
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

More latent tokens per question look more closely: pass the same `query_len` (trained: {query_lens}) to
`apply_chat_template` and to `generate`.

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{model_id}", trust_remote_code=True)
messages = [
    {{
        "role": "user",
        "content": [
            {{"type": "image", "path": "image.jpg"}},
            {{"type": "text", "text": "What is in the image?"}},
        ],
    }}
]
print(ask(text=messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```
"""

USAGE_WITHOUT_TOKENIZER = """\
This folder has no tokenizer: the source had none. The code is in this folder, for transformers {releases}.
The weights and the image processor load by themselves; for answers, convert again with `--tokenizer`.

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

model_id = "{model_id}"
image_processor = AutoImageProcessor.from_pretrained(model_id, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(model_id, trust_remote_code=True)
pixel_values = image_processor(Image.open("image.jpg"), return_tensors="pt").pixel_values.to(model.dtype)
print(model.get_image_features(pixel_values).pooler_output.shape)
```
"""


@dataclass(frozen=True)
class Provenance:
    """Where a folder comes from.

    Attributes:
        title: name of the new model.
        model_id: what the usage snippets load.
        sources: role -> name and revision of what went into it, such as `("checkpoint", "owner/name at commit abc")`.
        base_models: repositories that the Hub should link, as far as they are known.
        dtype: type of the weights.
        num_parameters: parameters of the model.
        has_tokenizer: whether the folder can answer questions.
        is_untrained: whether FUSION's own parts are fresh.
        stage: the authors' training stage that the source's name tells, if it is not the last.
        notes: further sentences about the conversion.
    """

    title: str
    model_id: str
    sources: tuple[tuple[str, str], ...]
    base_models: tuple[str, ...]
    dtype: torch.dtype
    num_parameters: int
    has_tokenizer: bool
    is_untrained: bool = False
    stage: str = LAST_STAGE
    notes: tuple[str, ...] = ()


def write_card(config: FusionConfig, provenance: Provenance) -> str:
    """The whole text of `README.md`."""
    member = None if provenance.is_untrained else find_member(config)
    sections = {
        f"# {provenance.title}": _introduction(config, provenance, member),
        "## Use": _usage(config, provenance),
        "## Tokens per image": _token_budget(config, member),
        "## Results": _results(provenance, member),
        "## Data": _data(provenance),
        "## Licence": _licence(member),
        "## Conversion": _conversion(provenance),
        "## Citation": CITATION,
    }
    body = "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in sections.items())
    return f"---\n{_metadata(provenance, member)}\n---\n\n{body}\n"


def _metadata(provenance: Provenance, member: FamilyMember | None) -> str:
    base_models = [member.backbone.repository, member.tower] if member else list(provenance.base_models)
    data = ModelCardData(
        base_model=base_models or None,
        datasets=None if provenance.is_untrained else list(DATASETS),
        language="en",
        library_name="transformers",
        license=member.backbone.licence if member else "other",
        pipeline_tag="image-text-to-text",
        tags=["fusion", "vision-language", *([UNTRAINED_TAG] if provenance.is_untrained else [])],
    )
    return data.to_yaml(line_break="\n").strip()


def _introduction(config: FusionConfig, provenance: Provenance, member: FamilyMember | None) -> str:
    vision = config.vision_config
    name = member.name if member else "FUSION"
    made = (
        "It is **untrained**: the language model and the tower have their weights, the parts between them are fresh."
        if provenance.is_untrained
        else "The weights are those of the checkpoint named below, renamed; nothing was trained."
    )
    parts = f"a {config.text_config.model_type} language model and a SigLIP tower of {vision.num_hidden_layers} layers"
    return (
        f"{name} ([paper]({PAPER}), [authors' code]({REPOSITORY})) for transformers: {parts}, "
        f"{provenance.num_parameters:,} parameters in {dtype_name(provenance.dtype)}. {made}\n\n"
        "The question guides the vision tower, and latent tokens look at the image again between the layers of the "
        "language model, under the question that they belong to."
    )


def _usage(config: FusionConfig, provenance: Provenance) -> str:
    lengths = ", ".join(map(str, config.query_lens))
    template = USAGE if provenance.has_tokenizer else USAGE_WITHOUT_TOKENIZER
    return template.format(model_id=provenance.model_id, query_lens=lengths, releases=TESTED)


def _token_budget(config: FusionConfig, member: FamilyMember | None) -> str:
    image = config.num_image_tokens
    rows = [
        f"| {q}{' (default)' if q == config.query_len else ''} | {image} | {image + q} |" for q in config.query_lens
    ]
    mean = sum(config.query_lens) / len(config.query_lens)
    lines = ["| latent tokens | image tokens | together |", "|---|---|---|", *rows, ""]
    lines.append(f"Each further question adds its latent tokens. On average over these lengths: {image + mean:.1f}")
    lines[-1] += f" (published as {member.row.vision_tokens})." if member else "."
    return "\n".join(lines)


def _results(provenance: Provenance, member: FamilyMember | None) -> str:
    if provenance.is_untrained:
        return "None: the model is untrained."
    if member is None or provenance.stage != LAST_STAGE:
        reason = f"this is the checkpoint after {provenance.stage}" if member else "this is no published size"
        return f"No figures are published for these weights ({reason}). For the family's, see the [paper]({PAPER})."
    scores = list(member.row.values.items())
    blocks = []
    for start in range(0, len(scores), BENCHMARKS_PER_LINE):
        names, figures = zip(*scores[start : start + BENCHMARKS_PER_LINE], strict=True)
        header = f"| {' | '.join(names).replace('^', '-')} |\n|{'---|' * len(names)}"
        blocks.append(f"{header}\n| {' | '.join(map(str, figures))} |")
    intro = (
        f"Published by the authors for {member.name} ([{member.checkpoint}]({HUB}{member.checkpoint})) in their "
        f"[repository]({REPOSITORY}); measured with their code, not on this folder:"
    )
    return "\n\n".join([intro, *blocks])


def _data(provenance: Provenance) -> str:
    if provenance.is_untrained:
        return "None beside what the two backbones were trained on."
    links = " and ".join(f"[{name}]({HUB}datasets/{name})" for name in DATASETS)
    return f"The authors' three stages use {links}."


def _licence(member: FamilyMember | None) -> str:
    if member is None:
        return "That of the weights that went in: see the base models. The code in this folder is under Apache-2.0."
    parts = (
        f"[{member.backbone.repository}]({HUB}{member.backbone.repository}) and [{member.tower}]({HUB}{member.tower})"
    )
    return (
        f"`{member.backbone.licence}`. {member.backbone.licence_note} Base models: {parts}; the authors ask users to "
        "comply with the language model's licence. The code in this folder is under Apache-2.0."
    )


def _conversion(provenance: Provenance) -> str:
    lines = [f"- {role}: {source}" for role, source in provenance.sources]
    lines += [f"- {note}" for note in provenance.notes]
    return "\n".join(["Made with the package `fusion_hf` from:", "", *lines])
