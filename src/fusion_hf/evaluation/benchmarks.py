"""The benchmarks of FUSION's published table, what lmms-eval calls them, and what their data hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fusion_hf.common.errors import InputError

AUTHORS, LMMS_EVAL = "authors", "lmms-eval"  # whose prompts
# Kinds of columns; one that ends with OPTIONAL may be empty, and EITHER is between two that are both allowed.
TEXT, TEXTS, INTEGER, NUMBER, RECORD, IMAGE, IMAGES = "text", "texts", "integer", "number", "record", "image", "images"
OPTIONAL, EITHER = "?", "|"
ID = TEXT + EITHER + INTEGER

PERCENT = 100.0  # of a share
NO_FILTER, LETTER_FILTER = "none", "flexible-extract"  # lmms-eval's names of what is done to answers before scoring

API_TYPE, OPENAI, AZURE = "API_TYPE", "openai", "azure"
JUDGE_VARIABLES: Mapping[str, tuple[str, ...]] = {
    OPENAI: ("OPENAI_API_KEY",),
    AZURE: ("AZURE_API_KEY", "AZURE_ENDPOINT"),
    "async_openai": ("OPENAI_API_KEY",),
    "async_azure": ("AZURE_API_KEY", "AZURE_ENDPOINT"),
    "bedrock": ("AWS_BEARER_TOKEN_BEDROCK",),
    "local": ("LLM_JUDGE_URL",),
}
SERVERS = tuple(JUDGE_VARIABLES)


@dataclass(frozen=True)
class BenchmarkJudge:
    """
    A language model that a benchmark's scoring asks.

    `model` is what is asked where MODEL_VERSION is not set, or always if `fixed`. `takes_endpoint`: the benchmark's
    scoring reads OPENAI_API_URL as the whole address, not as the base that `/chat/completions` is put behind.
    `api_types` are the values of API_TYPE that it knows.
    """

    model: str
    fixed: bool = False
    takes_endpoint: bool = False
    api_types: tuple[str, ...] = SERVERS

    def asked(self, environment: Mapping[str, str]) -> str:
        """The model that is asked in an environment."""
        return self.model if self.fixed else environment.get("MODEL_VERSION", self.model)

    def lacks(self, environment: Mapping[str, str]) -> list[str]:
        """What of the environment keeps the judge from being asked, in words; empty if nothing does."""
        api_type = environment.get(API_TYPE, OPENAI)
        if api_type not in self.api_types:
            return [f"{API_TYPE} is {api_type!r}; allowed: {', '.join(self.api_types)}"]
        return [f"{name} is not set" for name in JUDGE_VARIABLES[api_type] if not environment.get(name)]


GPT_4O = BenchmarkJudge("gpt-4o-2024-11-20")
GPT_4 = BenchmarkJudge("gpt-4", fixed=True, takes_endpoint=True, api_types=(OPENAI, AZURE))


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark as it is published, and what lmms-eval calls it.

    Args:
        name: ours, and that of its folder of local data.
        lmms_task: lmms-eval's, or None if it has none.
        authors_task: of our variant with the authors' prompt, or None if their prompt is lmms-eval's.
        columns: of the published table.
        metrics: lmms-eval's key `metric,filter` for each column.
        scale: what a metric is multiplied with for the table's unit.
        dataset, config, splits: of the Hub; only these splits are read.
        schema: the columns that lmms-eval's functions read, and their kinds.
        judge: the language model that scoring asks, or None.
        source: lmms-eval's YAML, in its folder `tasks`.
    """

    name: str
    lmms_task: str | None
    authors_task: str | None
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    scale: float
    dataset: str | None
    config: str | None
    splits: tuple[str, ...]
    schema: Mapping[str, str] = field(default_factory=dict)
    judge: BenchmarkJudge | None = None
    source: str | None = None

    @property
    def is_submitted(self) -> bool:
        """Whether a server scores it: it is answered and written down, see `submissions`."""
        return not self.metrics


def _metric(name: str, taken_by: str = NO_FILTER) -> str:
    return f"{name},{taken_by}"


_MMBENCH_SCHEMA = {
    "index": INTEGER,
    "image": IMAGE,
    "question": TEXT,
    "hint": TEXT + OPTIONAL,
    "answer": TEXT,
    "A": TEXT,
    "B": TEXT,
    "C": TEXT + OPTIONAL,
    "D": TEXT + OPTIONAL,
    "category": TEXT,
    "L2-category": TEXT,
    "source": TEXT + OPTIONAL,
    "split": TEXT,
}
_QUESTION = {"image": IMAGE, "question": TEXT, "answer": TEXT}

_TABLE = (
    Benchmark(
        name="mmbench_en",
        lmms_task="mmbench_en_dev_static",
        authors_task="fusion_mmbench_en",
        columns=("MMB_EN",),
        metrics=(_metric("gpt_eval_score"),),
        scale=1.0,
        dataset="lmms-lab-encoder/MMBench",
        config="en",
        splits=("dev",),
        schema=_MMBENCH_SCHEMA,
        source="mmbench/mmbench_en_dev_static.yaml",
    ),
    Benchmark(
        name="mmbench_cn",
        lmms_task="mmbench_cn_dev",
        authors_task="fusion_mmbench_cn",
        columns=("MMB_CN",),
        metrics=(_metric("gpt_eval_score"),),
        scale=1.0,
        dataset="lmms-lab-encoder/MMBench",
        config="cn",
        splits=("dev",),
        schema=_MMBENCH_SCHEMA,
        source="mmbench/mmbench_cn_dev.yaml",
    ),
    Benchmark(
        name="vizwiz_vqa",
        lmms_task="vizwiz_vqa_val",
        authors_task=None,
        columns=("VizWiz",),
        metrics=(_metric("exact_match"),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/VizWiz-VQA",
        config=None,
        splits=("val",),
        schema={"question_id": TEXT, "image": IMAGE, "question": TEXT, "answers": TEXTS},
        source="vizwiz_vqa/vizwiz_vqa_val.yaml",
    ),
    Benchmark(
        name="pope",
        lmms_task="pope",
        authors_task=None,
        columns=("POPE",),
        metrics=(_metric("pope_f1_score"),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/POPE",
        config=None,
        splits=("test",),
        schema={"question_id": ID, **_QUESTION},
        source="pope/pope.yaml",
    ),
    Benchmark(
        name="mmvet",
        lmms_task="mmvet",
        authors_task=None,
        columns=("MM-Vet",),
        metrics=(_metric("gpt_eval_score"),),
        scale=1.0,
        dataset="lmms-lab-encoder/MMVet",
        config=None,
        splits=("test",),
        schema={"question_id": ID, "image": IMAGE + OPTIONAL, "question": TEXT, "answer": TEXT, "capability": TEXT},
        judge=GPT_4O,
        source="mmvet/mmvet.yaml",
    ),
    Benchmark(
        name="mme",
        lmms_task="mme",
        authors_task=None,
        columns=("MME^P", "MME^C"),
        metrics=(_metric("mme_perception_score"), _metric("mme_cognition_score")),
        scale=1.0,
        dataset="lmms-lab-encoder/MME",
        config=None,
        splits=("test",),
        schema={"question_id": ID, "category": TEXT, **_QUESTION},
        source="mme/mme.yaml",
    ),
    Benchmark(
        name="seedbench",
        lmms_task="seedbench",
        authors_task=None,
        columns=("Seed-Image",),
        metrics=(_metric("seed_image"),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/SEED-Bench",
        config=None,
        splits=("test",),
        schema={
            "question_id": ID,
            "image": IMAGES,
            "question": TEXT,
            "choice_a": TEXT,
            "choice_b": TEXT,
            "choice_c": TEXT,
            "choice_d": TEXT,
            "answer": TEXT,
            "data_type": TEXT,
        },
        source="seedbench/seedbench.yaml",
    ),
    Benchmark(
        name="hallusion_bench_image",
        lmms_task="hallusion_bench_image",
        authors_task=None,
        columns=("HallB",),
        metrics=(_metric("aAcc"),),
        scale=1.0,
        dataset="lmms-lab-encoder/HallusionBench",
        config=None,
        splits=("image",),
        schema={
            "image": IMAGE,
            "question": TEXT,
            "gt_answer_details": TEXT,
            "category": TEXT,
            "subcategory": TEXT,
            "visual_input": ID,
            "set_id": ID,
            "figure_id": ID,
            "question_id": ID,
        },
        judge=GPT_4,
        source="hallusion_bench/hallusion_bench_image.yaml",
    ),
    Benchmark(
        name="llava_in_the_wild",
        lmms_task="llava_in_the_wild",
        authors_task=None,
        columns=("LLaVA_W",),
        metrics=(_metric("gpt_eval_llava_all"),),
        scale=1.0,
        dataset="lmms-lab-encoder/llava-bench-in-the-wild",
        config=None,
        splits=("train",),
        schema={
            "question_id": ID,
            "image": IMAGE,
            "question": TEXT,
            "gpt_answer": TEXT,
            "caption": TEXT + EITHER + TEXTS,
            "category": TEXT,
        },
        judge=GPT_4O,
        source="llava-in-the-wild/llava-in-the-wild.yaml",
    ),
    Benchmark(
        name="mmstar",
        lmms_task="mmstar",
        authors_task=None,
        columns=("MMStar",),
        metrics=(_metric("average"),),
        scale=PERCENT,
        dataset="Lin-Chen/MMStar",
        config=None,
        splits=("val",),
        schema={"index": ID, "category": TEXT, "l2_category": TEXT, **_QUESTION},
        source="mmstar/mmstar.yaml",
    ),
    Benchmark(
        name="mmerealworld",
        lmms_task="mmerealworld",
        authors_task=None,
        columns=("MME-RW",),
        metrics=(_metric("mme_realworld_score"),),
        scale=PERCENT,
        dataset="yifanzhang114/MME-RealWorld-Lmms-eval",
        config=None,
        splits=("train",),
        schema={
            "index": ID,
            "bytes": TEXT,  # the image in base64
            "question": TEXT,
            "multi-choice options": TEXTS,
            "answer": TEXT,
            "category": TEXT,
            "l2-category": TEXT,
        },
        source="mme_realworld/mme_realworld.yaml",
    ),
    Benchmark(
        name="realworldqa",
        lmms_task="realworldqa",
        authors_task=None,
        columns=("RWQA",),
        metrics=(_metric("exact_match"),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/RealWorldQA",
        config=None,
        splits=("test",),
        schema=_QUESTION,
        source="realworldqa/realworldqa.yaml",
    ),
    Benchmark(
        name="cv_bench",
        lmms_task="cv_bench",
        authors_task="fusion_cv_bench",
        columns=("CV-Bench",),
        metrics=(_metric("cv_bench_acc"),),
        scale=PERCENT,
        dataset="nyu-visionx/CV-Bench",
        config="default",
        splits=("test",),
        schema={
            "idx": INTEGER,
            "image": IMAGE,
            "prompt": TEXT,
            "choices": TEXTS,
            "answer": TEXT,
            "type": TEXT,
            "task": TEXT,
            "source": TEXT,
        },
        source="cv_bench/cv_bench.yaml",
    ),
    Benchmark(
        name="mmvp",
        lmms_task="mmvp",
        authors_task="fusion_mmvp",
        columns=("MMVP",),
        metrics=(_metric("mmvp_accuracy"),),
        scale=PERCENT,
        dataset="lmms-lab-eval/MMVP",
        config=None,
        splits=("train",),
        schema={"Index": INTEGER, "image": IMAGE, "Question": TEXT, "Options": TEXT, "Correct Answer": TEXT},
        source="mmvp/mmvp.yaml",
    ),
    Benchmark(
        name="ai2d",
        lmms_task="ai2d",
        authors_task=None,
        columns=("AI2D",),
        metrics=(_metric("exact_match", LETTER_FILTER),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/ai2d",
        config=None,
        splits=("test",),
        schema={"image": IMAGE, "question": TEXT, "options": TEXTS, "answer": ID},
        source="ai2d/ai2d.yaml",
    ),
    Benchmark(
        name="mathvista",
        lmms_task="mathvista_testmini_format",
        authors_task=None,
        columns=("MathVista",),
        metrics=(_metric("llm_as_judge_eval"),),
        scale=1.0,
        dataset="AI4Math/MathVista",
        config=None,
        splits=("testmini",),
        schema={
            "pid": ID,
            "decoded_image": IMAGE,
            "question": TEXT,
            "query": TEXT,
            "choices": TEXTS + OPTIONAL,
            "unit": TEXT + OPTIONAL,
            "precision": NUMBER + OPTIONAL,
            "answer": TEXT,
            "question_type": TEXT,
            "answer_type": TEXT,
            "metadata": RECORD,
        },
        judge=GPT_4O,
        source="mathvista/mathvista_testmini_format.yaml",
    ),
    Benchmark(
        name="mmmu_val",
        lmms_task="mmmu_val",
        authors_task="fusion_mmmu_val",
        columns=("MMMU",),
        metrics=(_metric("mmmu_acc"),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/MMMU",
        config=None,
        splits=("validation",),
        schema={
            "id": TEXT,
            "question": TEXT,
            "options": TEXT,  # a list as Python writes it
            "answer": TEXT,
            "question_type": TEXT,
            "image_1": IMAGE,
            **{f"image_{number}": IMAGE + OPTIONAL for number in range(2, 8)},
        },
        source="mmmu/mmmu_val.yaml",
    ),
    Benchmark(
        name="scienceqa_img",
        lmms_task="scienceqa_img",
        authors_task=None,
        columns=("SQA",),
        metrics=(_metric("exact_match"),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/ScienceQA",
        config="ScienceQA-IMG",
        splits=("test",),
        schema={
            "image": IMAGE + OPTIONAL,
            "question": TEXT,
            "hint": TEXT + OPTIONAL,
            "choices": TEXTS,
            "answer": INTEGER,
        },
        source="scienceqa/scienceqa_img.yaml",
    ),
    Benchmark(
        name="textvqa_val",
        lmms_task="textvqa_val",
        authors_task="fusion_textvqa_ocr",
        columns=("TextVQA",),
        metrics=(_metric("exact_match"),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/textvqa",
        config=None,
        splits=("validation",),
        schema={"question_id": ID, "image": IMAGE, "question": TEXT, "answers": TEXTS, "ocr_tokens": TEXTS},
        source="textvqa/textvqa_val.yaml",
    ),
    Benchmark(
        name="ocrbench",
        lmms_task="ocrbench",
        authors_task=None,
        columns=("OCRBench",),
        metrics=(_metric("ocrbench_accuracy"),),
        scale=PERCENT,
        dataset="echo840/OCRBench",
        config=None,
        splits=("test",),
        schema={
            "image": IMAGE,
            "question": TEXT,
            "answer": TEXTS + EITHER + TEXT,
            "dataset": TEXT,
            "question_type": TEXT,
        },
        source="ocrbench/ocrbench.yaml",
    ),
    Benchmark(
        name="chartqa",
        lmms_task="chartqa",
        authors_task=None,
        columns=("ChartQA",),
        metrics=(_metric("relaxed_overall"),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/ChartQA",
        config=None,
        splits=("test",),
        schema={"type": TEXT, **_QUESTION},
        source="chartqa/chartqa.yaml",
    ),
    Benchmark(
        name="docvqa",
        lmms_task="docvqa_val",
        authors_task=None,
        columns=("DocVQA",),
        metrics=(_metric("anls"),),
        scale=PERCENT,
        dataset="lmms-lab-encoder/DocVQA",
        config="DocVQA",
        splits=("validation",),
        schema={"questionId": ID, "image": IMAGE, "question": TEXT, "answers": TEXTS},
        source="docvqa/docvqa_val.yaml",
    ),
)

_EASY_VQA = Benchmark(
    name="easy_vqa",
    lmms_task=None,
    authors_task="fusion_easy_vqa",
    columns=(),
    metrics=(_metric("exact_match"),),
    scale=PERCENT,
    dataset=None,
    config=None,
    splits=("test",),
)

# by name, in the order of the published table; a benchmark without a column comes last
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (*_TABLE, _EASY_VQA)}


def _variant(of: str, name: str, task: str, source: str, split: str, unanswered: str) -> Benchmark:
    """A split of a benchmark whose answers are not published: it is answered and written down, and not scored."""
    benchmark = BENCHMARKS[of]
    schema = {key: kind + OPTIONAL if key == unanswered else kind for key, kind in benchmark.schema.items()}
    return replace(
        benchmark, name=name, lmms_task=task, source=source, splits=(split,), columns=(), metrics=(), schema=schema
    )


# what can be prepared and is no part of `all`: other prompts, and the splits that are scored by a server
VARIANTS: dict[str, Benchmark] = {
    variant.name: variant
    for variant in (
        replace(BENCHMARKS["textvqa_val"], name="textvqa_val_no_ocr", authors_task="fusion_textvqa", columns=()),
        _variant("mmbench_en", "mmbench_en_test", "mmbench_en_test", "mmbench/mmbench_en_test.yaml", "test", "answer"),
        _variant("mmbench_cn", "mmbench_cn_test", "mmbench_cn_test", "mmbench/mmbench_cn_test.yaml", "test", "answer"),
        _variant(
            "vizwiz_vqa", "vizwiz_vqa_test", "vizwiz_vqa_test", "vizwiz_vqa/vizwiz_vqa_test.yaml", "test", "answers"
        ),
        _variant("docvqa", "docvqa_test", "docvqa_test", "docvqa/docvqa_test.yaml", "test", "answers"),
    )
}


def find_benchmark(name: str) -> Benchmark:
    """
    Raises:
        InputError: if there is none of this name.
    """
    known = {**BENCHMARKS, **VARIANTS}
    if name not in known:
        raise InputError(f"tasks has {name!r}; allowed: {', '.join(known)}.")
    return known[name]
