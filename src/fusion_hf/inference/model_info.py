"""Identity of a loaded model, for records of answers and figures, and for clients of a server."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fusion_hf.common.user_values import dtype_name

if TYPE_CHECKING:
    from fusion_hf.inference.chat_model import ChatModel
    from fusion_hf.model.configuration_fusion import TokenBudget

# fields of a model that a server lists; the last one is OpenAI's, in answers
INFO, MAX_LENGTH, FINGERPRINT = "fusion", "max_model_len", "system_fingerprint"
NUMBERS = ("query_len", "image_token_grid", "max_length")


@dataclass(frozen=True)
class ModelInfo:
    """
    Identity of a loaded model.

    Attributes:
        revision: Changes with the model's configuration, template and weights.
        dtype, device: Dtype and device of its weights.
        query_len, image_token_grid: Token counts of questions that do not choose their own.
        max_length: Maximum number of tokens of a prompt and its answer together.
        published: Name of the published model with the same sizes, if there is one.
    """

    revision: str
    dtype: str
    device: str
    query_len: int
    image_token_grid: int
    max_length: int
    published: str | None

    @property
    def fingerprint(self) -> str:
        """Text that identifies the settings on which answers depend."""
        return f"{self.revision} {self.dtype} {self.query_len} {self.image_token_grid}"

    @classmethod
    def of(cls, chat_model: "ChatModel", budget: "TokenBudget") -> "ModelInfo":
        """
        Describe a loaded model.

        Args:
            chat_model: The model.
            budget: Token counts of questions that do not choose their own.
        """
        # imported here, because reading a record does not need torch
        from fusion_hf.hub.family import find_member
        from fusion_hf.inference.batching import digest_model

        model = chat_model.model
        member = find_member(model.config)
        return cls(
            revision=digest_model(chat_model),
            dtype=dtype_name(model.dtype),
            device=str(model.device),
            **budget._asdict(),
            max_length=chat_model.max_length,
            published=None if member is None else member.name,
        )

    @classmethod
    def read(cls, content: Any) -> "ModelInfo | None":
        """Read what `write` returned. Return None for anything else."""
        names = cls.__dataclass_fields__
        if not isinstance(content, dict) or not names.keys() <= content.keys():
            return None
        known = {name: content[name] for name in names}
        kinds = {name: int if name in NUMBERS else str for name in names}
        fitting = all(type(value) is kinds[name] for name, value in known.items() if name != "published")
        return cls(**known) if fitting and isinstance(known["published"], (str, type(None))) else None

    def write(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return asdict(self)
