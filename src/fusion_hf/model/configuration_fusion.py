"""Configuration of FUSION: a SigLIP tower that reads the question, a decoder-only LLM, latent tokens and samplers.

Source: FUSION, arXiv 2504.09925, and the behaviour of its authors' released checkpoints.
"""

from dataclasses import field
from math import isqrt
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, SiglipVisionConfig

from .compatibility_fusion import CACHE_NAMES

EARLY_TEXT_ATTENTION = ("uniform", "uniform_padded", "masked")
# the image is cut into 2 x 2 tiles; the overview follows them in `pixel_values`
TILES_PER_SIDE = 2
NUM_TILES = TILES_PER_SIDE**2
# every auto class that can load a FUSION folder without this package
AUTO_MAP = {
    "AutoConfig": "configuration_fusion.FusionConfig",
    "AutoModel": "modeling_fusion.FusionModel",
    "AutoModelForImageTextToText": "modeling_fusion.FusionForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_fusion.FusionForConditionalGeneration",
}
# outputs that models of transformers do not have
EXTRA_OUTPUTS = ("image_hidden_states", "image_outputs", "language_loss", "mapping_loss")
NUM_CONNECTOR_GROUPS = 2  # the connector averages two groups of hidden states, each `vision_early_layers` long


def is_perfect_square(number: int) -> bool:
    """Return whether `number` latents can be laid out as a square of at least one."""
    return number > 0 and isqrt(number) ** 2 == number


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise a `ValueError` that names a value and what is allowed, unless a condition holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}.")


class FusionConfig(PreTrainedConfig):
    r"""
    Configuration of a [`FusionForConditionalGeneration`]. The defaults have FUSION 3B's shape (Phi-3, SigLIP so400m/14
    at 384); the files in `configs/models` are the published family.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*): Configuration of the language model (phi3, llama,
            qwen2, ...).
        vision_config (`dict` or `SiglipVisionConfig`, *optional*): Configuration of the vision tower.
            `num_hidden_layers` counts the layers that are kept and run, one less than the published tower has.
        image_token_id (`int`, *optional*): Id of the placeholder of one image feature. Default: the first id after the
            vocabulary of the language model.
        latent_token_id (`int`, *optional*): Id of the placeholder of one latent token. Default: the second id after
            the vocabulary.
        vision_start_token_id, vision_end_token_id (`int`, *optional*): Ids that begin and end a block of image or
            latent tokens. Default: the last two ids of the vocabulary, as in the authors' checkpoints.
        query_len (`int`): Number of latent tokens per question at inference, a perfect square.
        query_lens (`list[int]`): Numbers of latent tokens that training draws from.
        window_size (`int`): Side of the window of the global context that one latent token reads.
        sampler_layers (`list[int]`, *optional*): Layers of the language model after which a sampler rewrites the
            latent tokens. Default: every third of the first thirty.
        sampler_num_heads (`int`): Number of attention heads of a sampler.
        vision_early_layers (`int`, *optional*): Number of early layers of the tower, and size of each of the
            connector's two groups. Default: half of the tower (13 of 26, 19 of 39).
        early_text_attention (`str`): What the question attends to in early layers of the tower. `"uniform"` takes the
            mean over patches and valid question tokens, `"uniform_padded"` over padding as well, as in the authors'
            batches. `"masked"` follows the paper: patches do not see the question there.
        image_token_grid (`int`, *optional*): Side of the grid to which image features are resized (16 in FUSION-L),
            unless a call passes another one. Default: no resizing.
        mapping_loss_weight (`float`): Weight of the two mapping losses.
        instruct_pad_token_id (`int`): Id that is ignored in the question, also if it is a real token, because the
            authors' mask is `ids != 0`.
        projector_hidden_act (`str`): Activation function of both projectors.
        assistant_header_ids (`list[int]`, *optional*): Ids with which the chat format begins a message of the
            assistant, without the white space at the end. With `turn_end_token_id`, the model finds turns and
            questions in the ids. Without them, callers must pass both.
        assistant_header_tail (`int`): Number of tokens of white space that end the assistant's header.
        user_header_ids (`list[int]`, *optional*): Ids with which the chat format begins a message of the user.
        user_header_tail (`int`): Number of tokens of white space that end the user's header.
        turn_end_token_id (`int`, *optional*): Id that ends a message of the user.
        question_separator_ids (`list[int]`, *optional*): Ids between the blocks of an image and its question.
        question_prefix_ids (`list[int]`, *optional*): Ids that the tokenizer puts before a text on its own.
        questions_are_cut (`bool`): Whether a question has the same ids in a prompt as in a text on its own.

    Raises:
        ValueError: for an impossible value; names the field, the value and what is allowed.

    Example:

    ```python
    >>> from fusion_hf import FusionConfig, nano_path
    >>> config = FusionConfig.from_pretrained(nano_path())
    >>> config.query_len, config.num_image_tokens
    (16, 36)

    ```
    """

    model_type = "fusion"
    sub_configs = {"text_config": AutoConfig, "vision_config": SiglipVisionConfig}
    # `Trainer.predict` and `compute_metrics` get the logits alone
    keys_to_ignore_at_inference = [*CACHE_NAMES, *EXTRA_OUTPUTS]

    # None until `__post_init__` has filled in what other fields imply, never after it: hence Any
    text_config: Any = None
    vision_config: Any = None
    image_token_id: Any = None
    latent_token_id: Any = None
    vision_start_token_id: Any = None
    vision_end_token_id: Any = None
    query_len: int = 36
    query_lens: list[int] = field(default_factory=lambda: [4, 16, 36, 64, 144])
    window_size: int = 3
    sampler_layers: Any = None
    sampler_num_heads: int = 16
    vision_early_layers: Any = None
    early_text_attention: str = "uniform"
    image_token_grid: int | None = None
    mapping_loss_weight: float = 0.1
    instruct_pad_token_id: int = 0
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool = False
    assistant_header_ids: list[int] | None = None
    assistant_header_tail: int = 0
    user_header_ids: list[int] | None = None
    user_header_tail: int = 0
    turn_end_token_id: int | None = None
    question_separator_ids: list[int] | None = None
    question_prefix_ids: list[int] | None = None
    questions_are_cut: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _build_sub_config("text_config", self.text_config, "phi3", {"vocab_size": 32013})
        self.vision_config = _build_sub_config(
            "vision_config",
            self.vision_config,
            "siglip_vision_model",
            {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
            },
        )
        vocab_size = self.text_config.vocab_size
        defaults = {
            "image_token_id": vocab_size,
            "latent_token_id": vocab_size + 1,
            "vision_start_token_id": vocab_size - 2,
            "vision_end_token_id": vocab_size - 1,
            "sampler_layers": list(range(0, min(30, self.text_config.num_hidden_layers), 3)),
            "vision_early_layers": self.vision_config.num_hidden_layers // NUM_CONNECTOR_GROUPS,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        # some backbones tie their head and say so only in their own configuration
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        self.check_values()
        super().__post_init__(**{"auto_map": dict(AUTO_MAP), **kwargs})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the values and, since arguments replace them, check what came out, as transformers does not."""
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with `return_unused_kwargs`
        config.check_values()
        return loaded

    @property
    def num_patches_per_side(self) -> int:
        """Patches per side of one tile, P."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that the LLM reads for one image: P * P, or the reduced grid's."""
        return self.grid_side() ** 2

    def grid_side(self, image_token_grid: int | None = None) -> int:
        """
        Side of the grid of image tokens that the LLM reads: the given one, else this configuration's, else P.

        Raises:
            ValueError: if what is given is no whole number from 1 to P.
        """
        side = self.num_patches_per_side
        if image_token_grid is None:
            return side if self.image_token_grid is None else self.image_token_grid
        if not isinstance(image_token_grid, int) or not 0 < image_token_grid <= side:
            allowed = f"a whole number from 1 to {side}, the tower's patches per side"
            raise ValueError(f"image_token_grid is {image_token_grid!r}; allowed: {allowed}.")
        return image_token_grid

    def check_values(self) -> None:
        """Raise a `ValueError` for the first field whose value is impossible."""
        text, vision, side = self.text_config, self.vision_config, self.num_patches_per_side
        self._require(is_perfect_square(self.query_len), "query_len", "a perfect square (1, 4, 9, 16, ...)")
        self._require(len(self.query_lens) > 0, "query_lens", "at least one perfect square")
        for length in self.query_lens:
            self._require(is_perfect_square(length), "query_lens", f"perfect squares only, not {length}")
        self._require(self.window_size > 0, "window_size", "at least 1")
        layers = text.num_hidden_layers
        for layer in self.sampler_layers:
            allowed = f"layers of the language model: 0 to {layers - 1}"
            self._require(0 <= layer < layers, "sampler_layers", allowed)
        distinct = len(set(self.sampler_layers)) == len(self.sampler_layers)
        self._require(distinct, "sampler_layers", "each layer once")
        divides = self.sampler_num_heads > 0 and text.hidden_size % self.sampler_num_heads == 0
        self._require(divides, "sampler_num_heads", f"a divisor of the language model's width {text.hidden_size}")
        most = vision.num_hidden_layers // NUM_CONNECTOR_GROUPS
        allowed = f"1 to {most}: two groups of that size must fit into the tower's {vision.num_hidden_layers} layers"
        self._require(0 < self.vision_early_layers <= most, "vision_early_layers", allowed)
        allowed = " | ".join(map(repr, EARLY_TEXT_ATTENTION))
        self._require(self.early_text_attention in EARLY_TEXT_ATTENTION, "early_text_attention", allowed)
        fits = self.image_token_grid is None or 0 < self.image_token_grid <= side
        self._require(fits, "image_token_grid", f"None or 1 to {side}, the tower's patches per side")
        self._require(self.mapping_loss_weight >= 0, "mapping_loss_weight", "0 or more")

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        require(condition, f"FusionConfig.{name}", getattr(self, name), allowed)


class TokenBudget(NamedTuple):
    """How many tokens show an image to the LLM."""

    query_len: int  # latent tokens per question, a perfect square
    image_token_grid: int  # side of the grid of image tokens

    @classmethod
    def of(
        cls, config: FusionConfig, query_len: int | None = None, image_token_grid: int | None = None
    ) -> "TokenBudget":
        """
        Take what a call gives, else what the configuration says.

        Raises:
            ValueError: for what no image can have.
        """
        length = config.query_len if query_len is None else query_len
        if not is_perfect_square(length):
            raise ValueError(f"query_len is {length}; allowed: a perfect square (1, 4, 9, 16, ...).")
        return cls(length, config.grid_side(image_token_grid))

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one image."""
        return self.image_token_grid**2


def _build_sub_config(
    name: str, value: dict | PreTrainedConfig | None, default_type: str, default_values: dict[str, Any]
) -> PreTrainedConfig:
    """A sub-configuration from a dict (with its `model_type`), from nothing (the defaults), or as it is."""
    if isinstance(value, PreTrainedConfig):
        return value
    values = dict(value) if value is not None else dict(default_values)
    model_type = values.pop("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        allowed = "a model type that transformers knows"
        raise ValueError(f"FusionConfig.{name}.model_type is {model_type!r}; allowed: {allowed}.")
    return CONFIG_MAPPING[model_type](**values)


FusionConfig.register_for_auto_class()  # so that saving a model or processor brings the code files along

__all__ = ["FusionConfig"]
