"""Reference pages that are made from the code: configuration, server, benchmarks, recipes and synthesis."""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from fusion_hf import FusionConfig
from fusion_hf.evaluation.benchmark_data import folder_of
from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS, Benchmark
from fusion_hf.serving import chat_requests
from fusion_hf.serving.fields import IMAGE_PART, IMAGE_URL, MESSAGE, REQUEST, STREAM_OPTIONS, TEXT_PART, Fields
from fusion_hf.serving.limits import MAX_IMAGES, Limits
from fusion_hf.synthesis.run_config import (
    CaptionPool,
    EndpointSettings,
    ExecutorSettings,
    ImageCheckSettings,
    ImageSettings,
    SynthesisConfig,
)
from fusion_hf.training.recipe_keys import OwnArguments

TRANSFORMERS = "https://huggingface.co/docs/transformers"
SECTION = re.compile(r"^(?:Args|Attributes):\n(.*?)(?=^\w+:$|\Z)", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^    (?! )(.+?): (.*(?:\n(?:     .*|(?=\n)))*)", re.MULTILINE)
NAME = re.compile(r"(\w+)(?: \(([^)]*)\))?(?:, |$)")
# of the tower's configuration, which is one of transformers: what decides the shapes
VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Write a Markdown table."""
    names = list(head)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return [*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows), ""]


def cell(text: str | None) -> str:
    """Write a text so that it stays within its cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", (text or "")).replace("\n", " ")


def described(kind: type) -> dict[str, tuple[str, str]]:
    """Read the documented type and meaning of each field from the docstring of a class."""
    found: dict[str, tuple[str, str]] = {}
    for section in SECTION.findall(inspect.cleandoc(kind.__doc__ or "")):
        for names, text in ENTRY.findall(section):
            for name, written in NAME.findall(names):
                kind_of = written.partition(", defaults to")[0]  # the default has a column of its own
                found[name] = (kind_of, sentence(" ".join(text.split())))
            unwritten = [name for name, written in NAME.findall(names) if not written]
            for name in unwritten:  # `a, b (int)`: the type stands behind the last name
                found[name] = (NAME.findall(names)[-1][1], found[name][1])
    return found


def sentence(text: str) -> str:
    """Begin with a capital letter, unless the text begins with code or with a name such as rsLoRA."""
    return text[:1].upper() + text[1:] if text.partition(" ")[0].islower() else text


def default_of(each: Field[Any]) -> str:
    """Write the default of a dataclass's field; empty where there is none."""
    value = each.default_factory() if each.default_factory is not MISSING else each.default
    if value is MISSING or value is None or is_dataclass(value):
        return ""
    return f"`{json.dumps(value)}`" if isinstance(value, (bool, list, dict)) else f"`{value}`"


def config_page() -> str:
    """Make the page of the fields of `FusionConfig` and of its two sub-configurations."""
    known = described(FusionConfig)
    declared = {each.name: each for each in fields(FusionConfig) if each.name in FusionConfig.__annotations__}
    rows = [(f"`{name}`", known[name][0], default_of(declared[name]), known[name][1]) for name in known]
    config = FusionConfig()
    vision = [(f"`{name}`", f"`{getattr(config.vision_config, name)}`") for name in VISION_KEYS]
    return page(
        "# Configuration",
        "`config.json` of a FUSION folder holds these fields, which are the arguments of `FusionConfig`. A "
        "field without a",
        "default here is filled in from other fields, as its description says, or stays empty. An impossible "
        "value is a",
        "`ValueError` that names the field, its value and what is allowed.",
        "",
        *table(("field", "type", "default", "meaning"), rows),
        "## `vision_config`",
        "",
        "The vision tower has a",
        f"[`SiglipVisionConfig`]({TRANSFORMERS}/model_doc/siglip#transformers.SiglipVisionConfig) of",
        "transformers. Without one, FUSION takes these values:",
        "",
        *table(("field", "default"), vision),
        "## `text_config`",
        "",
        "The language model has the configuration class of its own `model_type`, such as `phi3`, `llama`, "
        "`qwen2`, `qwen3` or",
        f"`mistral`. Without one, FUSION takes a `{config.text_config.model_type}` configuration with",
        f"`vocab_size` {config.text_config.vocab_size} and the defaults of transformers.",
    )


# what the fields of a request mean; the server's own tables say which there are
REQUEST_MEANINGS = {
    "model": "The name of the model. `GET /v1/models` lists it.",
    "messages": "The conversation. See [Messages](#messages).",
    "max_tokens": "The largest number of tokens of the answer. The server's limit holds as well.",
    "max_completion_tokens": "The same under OpenAI's newer name. If you give both, they must be equal.",
    "temperature": f"A number from 0 to {chat_requests.MAX_TEMPERATURE:g}. The default is 0, the most likely answer "
    "(OpenAI's default is 1).",
    "top_p": "A number above 0, up to 1. It needs a `temperature`.",
    "seed": f"A whole number of {chat_requests.SEED_BITS} bits with its sign. The same seed draws the same "
    f"answer, up to rounding.",
    "stop": f"A text of up to {chat_requests.MAX_STOP_CHARACTERS} characters, or up to {chat_requests.MAX_STOPS} of "
    "them. The answer ends before the first one.",
    "stream": "`true` sends the answer in pieces, as server-sent events.",
    "stream_options": 'With `stream`: `{"include_usage": true}` sends the number of tokens at the end.',
    "query_len": "The number of latent tokens per question, a perfect square.",
    "image_token_grid": "The side of the grid of image tokens. A smaller grid is faster and sees less.",
}
STATUSES = (
    (400, "A field, a message, an image or the length of the prompt is wrong. `param` names the field."),
    (401, "The key is missing or wrong."),
    (404, "There is no such path or model."),
    (405, "The path has no such method."),
    (408, "The body did not arrive in time."),
    (413, "The body or the image file is too large."),
    (415, "`Content-Type` is not `application/json`."),
    (429, "The queue is full. `Retry-After` says when to try again."),
    (500, "The request failed inside the server. The server's log says why."),
    (503, "The server is overloaded, or no answer began in time. Try again after `Retry-After`."),
)
# the options that are not `--max-` and the name of the limit
LIMIT_OPTIONS = {
    "answer_tokens": "--max-new-tokens",
    "image_cache_bytes": "--image-cache-bytes",
    "parallel": "--concurrency",
    "queue_length": "--queue-length",
}
LIMIT_STATUSES = {
    "image_bytes": "413",
    "image_pixels": "400",
    "image_seconds": "400",
    "body_bytes": "413",
    "upload_bytes": "503",
    "prompt_tokens": "400, code `context_length_exceeded`",
    "answer_tokens": "none: the answer ends with `finish_reason` `length`",
    "image_cache_bytes": "none: older features are dropped",
    "parallel": "none: further requests wait",
    "queue_length": "429",
    "seconds": "503 before an answer begins; then the answer ends with `finish_reason` `length`",
}


def neutral(known: Fields, prefix: str = "") -> Iterator[tuple[str, str]]:
    """List fields that are only accepted with the values that ask for nothing: names and values."""
    grouped: dict[str, list[str]] = {}
    for name, values in known.neutral.items():
        shown = ", ".join(f"`{json.dumps(value)}`" for value in values)
        grouped.setdefault(shown, []).append(f"`{prefix}{name}`")
    for shown, names in grouped.items():
        yield ", ".join(names), shown


def server_page() -> str:
    """Make the page of the fields, limits and statuses of the server."""
    limits, default = described(Limits), Limits()
    parts = (
        (STREAM_OPTIONS, "stream_options."),
        (MESSAGE, "messages[]."),
        (TEXT_PART, "text part: "),
        (IMAGE_URL, "image_url."),
    )
    ignored = [(REQUEST, ""), (MESSAGE, "messages[]."), (TEXT_PART, "text part: "), (IMAGE_PART, "image part: ")]
    return page(
        "# Server fields",
        "`POST /v1/chat/completions` of [`fusion-hf serve`](../serving.md) takes a JSON object with these "
        "fields. A field that is",
        "null counts as absent. Every field or value that this page does not list is refused with status 400, "
        "an error that names",
        "the field, its value and the allowed values.",
        "",
        *table(("field", "meaning"), [(f"`{name}`", REQUEST_MEANINGS[name]) for name in REQUEST.known]),
        "## Messages",
        "",
        f"A message has {names_of(MESSAGE.known)}. `role` is `system` (or `developer`), `user` or `assistant`. "
        f"`content` is a text,",
        f"or a list of parts. A text part has {names_of(TEXT_PART.known)}. An image part, only in messages of "
        f"the user, has",
        f"{names_of(IMAGE_PART.known)}, and `image_url` has {names_of(IMAGE_URL.known)}. A request has at most "
        f"{MAX_IMAGES} image; the same",
        "`url` in several messages counts once.",
        "",
        "## Fields with a single meaning",
        "",
        "The server does not have these features. It accepts the values that ask for nothing, so that clients "
        "which always send them",
        "work. Every other value is refused.",
        "",
        *table(
            ("field", "accepted values"),
            [*neutral(REQUEST), *(row for known, prefix in parts for row in neutral(known, prefix))],
        ),
        "## Ignored fields",
        "",
        "These fields are accepted with any value and change no answer: "
        + ", ".join(f"`{prefix}{name}`" for known, prefix in ignored for name in known.ignored)
        + ".",
        "",
        "## Limits",
        "",
        "These options of [`fusion-hf serve`](cli.md#fusion-hf-serve) set the limits.",
        "",
        *table(
            ("option", "default", "meaning", "status beyond it"),
            [
                (f"`{option_of(name)}`", f"{getattr(default, name)}", meaning, LIMIT_STATUSES[name])
                for name, (_, meaning) in limits.items()
            ],
        ),
        "## Statuses",
        "",
        'An error is the JSON object `{"error": {"message", "type", "param", "code"}}` with one of these statuses:',
        "",
        *table(("status", "reason"), [(str(status), reason) for status, reason in STATUSES]),
    )


def option_of(limit: str) -> str:
    """Name the option of `fusion-hf serve` that sets a limit."""
    return LIMIT_OPTIONS.get(limit, f"--max-{limit.replace('_', '-')}")


def names_of(names: Iterable[str]) -> str:
    """List names as code."""
    return " and ".join(f"`{name}`" for name in names)


# what each benchmark asks about
MEASURES = {
    "mmbench_en": "multiple-choice questions on perception and reasoning, in English",
    "mmbench_cn": "the questions of MMBench in Chinese",
    "vizwiz_vqa": "questions of blind people about their own photos",
    "pope": "whether an object is in the image: a test for hallucination",
    "mmvet": "open questions that combine several abilities",
    "mme": "yes-or-no questions on perception and cognition",
    "seedbench": "multiple-choice questions on spatial understanding of an image",
    "hallusion_bench_image": "yes-or-no questions on illusions and edited images",
    "llava_in_the_wild": "open questions about varied images",
    "mmstar": "multiple-choice questions that cannot be answered without the image",
    "mmerealworld": "multiple-choice questions about large, detailed images",
    "realworldqa": "questions about photos of everyday and traffic scenes",
    "cv_bench": "counting, relations, depth and distance",
    "mmvp": "pairs of images that CLIP confuses",
    "ai2d": "multiple-choice questions about diagrams of school science",
    "mathvista": "mathematics in figures, charts and photos",
    "mmmu_val": "questions of college exams in 30 subjects",
    "scienceqa_img": "multiple-choice questions of school science with an image",
    "textvqa_val": "reading text in photos",
    "ocrbench": "recognizing and understanding text",
    "chartqa": "questions about charts",
    "docvqa": "questions about scanned documents",
    "easy_vqa": "color and shape of one drawn object; it is bundled and needs no download",
}


def local_data(benchmark: Benchmark) -> str:
    """Name the files below the data root; none for a benchmark that is bundled."""
    files = [f"`{folder_of(benchmark)}/{split}-*.parquet`" for split in benchmark.splits]
    return ", ".join(files) if benchmark.dataset else ""


def measured(benchmark: Benchmark) -> tuple[str, ...]:
    """Say what a benchmark measures, and by which metric."""
    metrics = ", ".join(f"`{metric.partition(',')[0]}`" for metric in benchmark.metrics)
    return f"`{benchmark.name}`", ", ".join(benchmark.columns), MEASURES[benchmark.name], metrics


def needed(name: str, benchmark: Benchmark) -> tuple[str, ...]:
    """Say where the data of a task are, and who judges its answers."""
    dataset = f"`{benchmark.dataset}`" + (f", `{benchmark.config}`" if benchmark.config else "")
    judge = f"`{benchmark.judge.model}`" if benchmark.judge else ""
    return f"`{name}`", dataset if benchmark.dataset else "bundled", local_data(benchmark), judge


def benchmarks_page() -> str:
    """Make the page of the benchmarks that `fusion-hf evaluate --tasks` knows."""
    published = sum(bool(benchmark.columns) for benchmark in BENCHMARKS.values())
    return page(
        "# Evaluation benchmarks",
        f"`fusion-hf evaluate --tasks NAME,NAME` runs these benchmarks: the {published} of the published table, "
        "and `easy_vqa`.",
        "`--tasks all` runs all of them. [How benchmarks are asked and scored](../evaluation_tasks.md) says how "
        "each of them is asked "
        "and scored.",
        "",
        "## What they measure",
        "",
        "*Column* is the column of the published table.",
        "",
        *table(("task", "column", "what it measures", "metric"), map(measured, BENCHMARKS.values())),
        "## Where their data are",
        "",
        "The data come from the Hub, or from the files below `--data-root`. A judge is a language model that scores "
        "the answers.",
        "",
        "The last tasks are not part of `all`: `textvqa_val_no_ocr` has another prompt, and the `_test` tasks write "
        "answers for a server of the benchmark, since their right answers are not published.",
        "",
        *table(
            ("task", "data set on the Hub", "local data", "judge"),
            (needed(name, one) for name, one in {**BENCHMARKS, **VARIANTS}.items()),
        ),
    )


# the keys of a recipe by what they concern
RECIPE_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Model and data": ("model", "data", "data_root", "data_cache", "streaming", "max_length"),
    "Broken records and images": (
        *("on_broken", "max_skipped", "on_truncated", "max_image_pixels"),
        *("image_roots", "image_hosts", "private_image_hosts"),
    ),
    "Evaluation during training": ("eval_data", "eval_samples", "eval_max_new_tokens"),
    "Steps and batches": ("global_batch_size", "group_by", "query_lens", "query_len_draw", "loss_average"),
    "What is trained": (
        *("train", "vision_tower_learning_rate", "projector_learning_rate", "sampler_learning_rate"),
        *("save_dtype", "peak_tflops"),
    ),
    "LoRA and quantization": (
        *("lora_rank", "lora_parts", "lora_alpha", "lora_dropout", "lora_targets", "lora_dora", "lora_rslora"),
        *("lora_bias", "load_in_4bit", "load_in_8bit"),
    ),
}


def recipe_page() -> str:
    """Make the page of the keys that FUSION adds to those of `TrainingArguments`."""
    own = {each.name: each for each in fields(OwnArguments)}
    hints = get_type_hints(OwnArguments)
    lines = []
    for title, names in RECIPE_SECTIONS.items():
        rows = [
            (f"`{name}`", written_type(hints[name]), default_of(own[name]), sentence(own[name].metadata["help"]))
            for name in names
        ]
        lines += [f"## {title}", "", *table(("key", "type", "default", "meaning"), rows)]
    return page(
        "# Recipe keys",
        "A recipe of [`fusion-hf train`](../training.md) is a YAML file with these keys, and with all arguments "
        "of transformers'",
        f"[`TrainingArguments`]({TRANSFORMERS}/main_classes/trainer#transformers.TrainingArguments). `KEY=VALUE`",
        "on the command line replaces a key. An unknown key is an error that names the nearest known one.",
        "",
        *lines,
    )


def synthesis_page() -> str:
    """Make the page of the keys of a synthesis configuration and of its sections."""
    sections = (
        ("Keys of the file", SynthesisConfig),
        ("`pool`", CaptionPool),
        ("`writer`, `judge` and `image_check.endpoint`", EndpointSettings),
        ("`images`", ImageSettings),
        ("`image_check`", ImageCheckSettings),
        ("`executor`", ExecutorSettings),
    )
    lines = []
    for title, kind in sections:
        known, hints = described(kind), get_type_hints(kind)
        rows = [
            (f"`{each.name}`", written_type(hints[each.name]), default_of(each), known[each.name][1])
            for each in fields(kind)
        ]
        lines += [f"## {title}", "", *table(("key", "type", "default", "meaning"), rows)]
    return page(
        "# Synthesis keys",
        "A configuration of [`fusion-hf synthesize`](../synthesis.md) is a YAML file with these keys. "
        "`key=value` on the command line",
        "replaces a key, and `section.key=value` replaces a key of a section. An unknown key is an error that "
        "names the nearest known one.",
        "`output` and `records` are required. The backend `models` also needs `pool`, `writer` and `images`.",
        "",
        *lines,
    )


def written_type(hint: Any) -> str:
    """Write the type of a value as YAML has it."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) in (list, tuple):
        return "list of " + written_type(options[0])
    if get_origin(hint) is dict or hint is dict:
        return "mapping"
    if options and all(isinstance(option, str) for option in options):
        return ", ".join(f"`{option}`" for option in options)
    if options:
        return written_type(options[0])
    if is_dataclass(hint):
        return "section"
    return {"str": "text", "int": "integer", "bool": "boolean", "float": "number", "Path": "path"}[hint.__name__]


def page(title: str, *lines: str) -> str:
    """Put a page together."""
    return "\n".join([title, "", *lines]).rstrip() + "\n"


PAGES = {
    "config.md": config_page,
    "server.md": server_page,
    "benchmarks.md": benchmarks_page,
    "recipe_keys.md": recipe_page,
    "synthesis_keys.md": synthesis_page,
}
