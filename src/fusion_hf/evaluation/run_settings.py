"""Find the settings that differ between two records, and the stages of an answer that they affect."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fusion_hf.evaluation.run_answers import RunAnswers

# maps the first part of a setting's name to the stages of `stage_comparison.STAGES` that it affects
ACTS_ON = {
    "chat_template": ("prompt",),
    "prompts": ("prompt",),
    "tokenizer_sha256": ("ids", "decoding"),
    "query_len": ("prompt", "ids", "features"),
    "image_token_grid": ("ids", "features"),
    "image_processor": ("pixels",),
    "revision": ("prompt", "ids", "features", "logits"),
    "dtype": ("features", "logits"),
    "device": ("features", "logits"),
    "attn_implementation": ("features", "logits"),
    "torch_threads": ("features", "logits"),
    "batch_size": ("features", "logits"),
    "url": ("features", "logits", "decoding"),
    "generation_config": ("decoding",),
    "judge": ("scoring",),
    "pillow": ("pixels",),
    "torch": ("features", "logits"),
    "transformers": ("prompt", "ids", "features", "logits", "decoding"),
    "fusion_hf": ("prompt", "ids", "pixels", "features", "logits", "decoding", "scoring"),
    "lmms_eval": ("prompt", "scoring"),
    "datasets": ("pixels",),
}
REVISION = "revision"
OF_MODEL = (REVISION, "dtype", "device", "query_len", "image_token_grid", "url")
OF_RUN = ("batch_size", "prompts")
LONGEST = 60  # maximum number of characters of a value


@dataclass(frozen=True)
class SettingDifference:
    """A setting that differs between two records."""

    name: str
    first: Any
    second: Any

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of an answer that the setting affects."""
        return ACTS_ON.get(self.name.partition(".")[0], ())

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.first)} and {_shown(self.second)}"


def differing_settings(first: RunAnswers, second: RunAnswers) -> list[SettingDifference]:
    """
    Return the settings that both records have with different values.

    Args:
        first: the first run.
        second: the second run.
    """
    own, other = dict(_settings(first)), dict(_settings(second))
    return [
        SettingDifference(name, value, other[name])
        for name, value in own.items()
        if name in other and other[name] != value
    ]


def _settings(run: RunAnswers) -> Iterator[tuple[str, Any]]:
    """Yield settings by name. Those of groups are called `group.name`."""
    if run.record is None:
        return
    for name in OF_RUN:
        yield name, vars(run.record)[name]
    for name in OF_MODEL:
        value = vars(run.record.model)[name]
        yield name, value.rpartition("@")[2] if name == REVISION else value  # the name of a folder is irrelevant
    for task in run.record.tasks:
        yield f"judge.{task.task}", task.judge
    for name, value in (run.record.model.settings or {}).items():
        if name == "folder":
            continue
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", each) for key, each in value.items())
        else:
            yield name, value
    yield from run.versions.items()


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"({len(text)} characters)"
