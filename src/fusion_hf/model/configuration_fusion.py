"""Configuration of FUSION: a SigLIP tower that reads the question, a decoder-only LLM, latent tokens and samplers.

Source: FUSION, arXiv 2504.09925, and the behaviour of its authors' released checkpoints.
"""

from dataclasses import field
from math import isqrt
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, SiglipVisionConfig

from .compatibility_fusion import CACHE_NAMES

EARLY_TEXT_ATTENTION = ("uniform", "uniform_padded", "masked")
# The image is cut into 2 x 2 tiles. In `pixel_values`, the overview follows the tiles.
TILES_PER_SIDE = 2
NUM_TILES = TILES_PER_SIDE**2
# Every auto class that can load a FUSION folder without this package.
AUTO_MAP = {
    "AutoConfig": "configuration_fusion.FusionConfig",
    "AutoModel": "modeling_fusion.FusionModel",
    "AutoModelForImageTextToText": "modeling_fusion.FusionForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_fusion.FusionForConditionalGeneration",
}
# Outputs that the models of transformers do not have.
EXTRA_OUTPUTS = ("image_hidden_states", "image_outputs", "language_loss", "mapping_loss")
NUM_CONNECTOR_GROUPS = 2  # the connector averages two groups of hidden states, each `vision_early_layers` long


def is_perfect_square(number: int) -> bool:
    """Return whether `number` latent tokens can be laid out as a square with at least one token."""
    return number > 0 and isqrt(number) ** 2 == number


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """
    Check the value of an argument or a field.

    Args:
        condition (`bool`): Whether the value is allowed.
        name (`str`): Name of the argument or field.
        value: The value that was given.
        allowed (`str`): Description of the allowed values, which completes the phrase "must be".

    Raises:
        ValueError: If `condition` is False. The message names the field, its value and the allowed values.
    """
    if not condition:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


class FusionConfig(PreTrainedConfig):
    r"""
    This is the configuration class of [`FusionForConditionalGeneration`] and [`FusionModel`]. It defines the vision
    tower, the language model and the parts of FUSION between them. The defaults describe FUSION 3B (Phi-3, SigLIP
    so400m/14 at 384 pixels). The files in `configs/models` describe the published models.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*): Configuration of the language model (phi3, llama,
            qwen2, ...).
        vision_config (`dict` or `SiglipVisionConfig`, *optional*): Configuration of the vision tower.
            `num_hidden_layers` counts the layers that are kept and run, which is one less than in the published tower.
        image_token_id (`int`, *optional*): Id of the placeholder for one image feature. Defaults to the first id after
            the vocabulary of the language model.
        latent_token_id (`int`, *optional*): Id of the placeholder for one latent token. Defaults to the second id
            after the vocabulary.
        vision_start_token_id, vision_end_token_id (`int`, *optional*): Ids of the tokens before and after each block
            of image or latent tokens. Defaults to the last two ids of the vocabulary, as in the authors' checkpoints.
        query_len (`int`, defaults to 36): Number of latent tokens per question at inference, a perfect square.
        query_lens (`list[int]`): Perfect squares from which training draws the number of latent tokens.
        window_size (`int`, defaults to 3): Side of the window of the global context that one latent token attends to.
        sampler_layers (`list[int]`, *optional*): Layers of the language model after which a sampler updates the latent
            tokens. Defaults to every third of the first thirty layers.
        sampler_num_heads (`int`, defaults to 16): Number of attention heads of a sampler.
        vision_early_layers (`int`, *optional*): Number of early layers of the tower, which is also the size of each of
            the connector's two groups. Defaults to half of the tower (13 of 26, 19 of 39).
        early_text_attention (`str`, defaults to `"uniform"`): What the question tokens attend to in early layers. With
            `"uniform"`, they take the mean over the patches and the valid question tokens. With `"uniform_padded"`,
            the mean includes padding, as in the authors' batches. With `"masked"`, patches do not attend to the
            question in early layers, as the paper describes.
        image_token_grid (`int`, *optional*): Side of the grid to which image features are resized (FUSION-L: 16), for
            calls that do not pass their own.
        mapping_loss_weight (`float`, defaults to 0.1): Weight of the two mapping losses.
        instruct_pad_token_id (`int`, defaults to 0): Id that is ignored in the question, even where 0 is a real token:
            the authors' mask is `ids != 0`.
        projector_hidden_act (`str`, defaults to `"gelu"`): Activation function of both projectors.
        assistant_header_ids (`list[int]`, *optional*): Ids that begin an assistant message, without the white space at
            the end of the header. With this field and `turn_end_token_id`, the model finds turns and questions in
            `input_ids`. Without them, you must pass `prompt_end_positions` and `instruct_input_ids`.
        assistant_header_tail (`int`, defaults to 0): Number of white-space tokens at the end of the assistant header.
        user_header_ids (`list[int]`, *optional*): Ids that begin a user message, without white space at the end.
        user_header_tail (`int`, defaults to 0): Number of white-space tokens at the end of the user header.
        turn_end_token_id (`int`, *optional*): Id of the token that ends a user message.
        question_separator_ids (`list[int]`, *optional*): Ids between the blocks of an image and its question.
        question_prefix_ids (`list[int]`, *optional*): Ids that the tokenizer adds before a standalone text.
        questions_are_cut (`bool`, defaults to `False`): Whether a question has the same ids inside a prompt and as a
            standalone text.

    Raises:
        ValueError: If a value is impossible. The message names the field, its value and the allowed values.

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
    # `Trainer.predict` and `compute_metrics` receive only the logits.
    keys_to_ignore_at_inference = [*CACHE_NAMES, *EXTRA_OUTPUTS]

    # None only until `__post_init__` fills in what other fields imply, hence `Any`.
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
        # Some backbones tie their language head and state it only in their own configuration.
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        self.check_values()
        super().__post_init__(**{"auto_map": dict(AUTO_MAP), **kwargs})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a configuration from a dictionary and check the values again, since `kwargs` may replace them."""
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with `return_unused_kwargs`
        config.check_values()
        return loaded

    @property
    def num_patches_per_side(self) -> int:
        """Number of patches P along each side of one tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Number of image tokens that the language model reads per image: P * P, or those of the reduced grid."""
        return self.grid_side() ** 2

    def grid_side(self, image_token_grid: int | None = None) -> int:
        """
        Return the side of the grid of image tokens that the language model reads.

        Args:
            image_token_grid (`int`, *optional*): Side that a call asks for. Defaults to the `image_token_grid` of this
                configuration, or else to the number of patches per side, P.

        Returns:
            `int`: The side of the grid, from 1 to P.

        Raises:
            ValueError: If `image_token_grid` is not a whole number from 1 to P.
        """
        side = self.num_patches_per_side
        if image_token_grid is None:
            return side if self.image_token_grid is None else self.image_token_grid
        allowed = f"a whole number from 1 to {side} (the tower's patches per side)"
        is_valid = isinstance(image_token_grid, int) and 0 < image_token_grid <= side
        require(is_valid, "image_token_grid", image_token_grid, allowed)
        return image_token_grid

    def check_values(self) -> None:
        """
        Check the values of all fields.

        Raises:
            ValueError: If the value of a field is impossible. The message names the first such field.
        """
        text, vision, side = self.text_config, self.vision_config, self.num_patches_per_side
        self._require(is_perfect_square(self.query_len), "query_len", "a perfect square (1, 4, 9, 16, ...)")
        self._require(len(self.query_lens) > 0, "query_lens", "a list of at least one perfect square")
        for length in self.query_lens:
            self._require(is_perfect_square(length), "query_lens", "a list of perfect squares (1, 4, 9, 16, ...)")
        self._require(self.window_size > 0, "window_size", "at least 1")
        layers = text.num_hidden_layers
        for layer in self.sampler_layers:
            allowed = f"a list of layers of the language model (0 to {layers - 1})"
            self._require(0 <= layer < layers, "sampler_layers", allowed)
        distinct = len(set(self.sampler_layers)) == len(self.sampler_layers)
        self._require(distinct, "sampler_layers", "a list without duplicates")
        divides = self.sampler_num_heads > 0 and text.hidden_size % self.sampler_num_heads == 0
        allowed = f"a divisor of the language model's hidden size {text.hidden_size}"
        self._require(divides, "sampler_num_heads", allowed)
        most = vision.num_hidden_layers // NUM_CONNECTOR_GROUPS
        layers = vision.num_hidden_layers
        allowed = f"from 1 to {most} (two groups of that size must fit in the tower's {layers} layers)"
        self._require(0 < self.vision_early_layers <= most, "vision_early_layers", allowed)
        allowed = f"one of {', '.join(map(repr, EARLY_TEXT_ATTENTION))}"
        self._require(self.early_text_attention in EARLY_TEXT_ATTENTION, "early_text_attention", allowed)
        fits = self.image_token_grid is None or 0 < self.image_token_grid <= side
        self._require(fits, "image_token_grid", f"None or from 1 to {side} (the tower's patches per side)")
        self._require(self.mapping_loss_weight >= 0, "mapping_loss_weight", "0 or more")

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        require(condition, f"FusionConfig.{name}", getattr(self, name), allowed)


class TokenBudget(NamedTuple):
    """Numbers of latent and image tokens that represent one image in the language model."""

    query_len: int  # latent tokens per question, a perfect square
    image_token_grid: int  # side of the grid of image tokens

    @classmethod
    def of(
        cls, config: FusionConfig, query_len: int | None = None, image_token_grid: int | None = None
    ) -> "TokenBudget":
        """
        Combine the arguments of a call with the defaults of the configuration.

        Args:
            config ([`FusionConfig`]): Configuration of the model, which gives the defaults.
            query_len (`int`, *optional*): Number of latent tokens per question, a perfect square.
            image_token_grid (`int`, *optional*): Side of the grid of image tokens.

        Returns:
            [`TokenBudget`]: The token counts of this call.

        Raises:
            ValueError: If `query_len` is not a perfect square or `image_token_grid` is out of range.
        """
        length = config.query_len if query_len is None else query_len
        require(is_perfect_square(length), "query_len", length, "a perfect square (1, 4, 9, 16, ...)")
        return cls(length, config.grid_side(image_token_grid))

    @property
    def num_image_tokens(self) -> int:
        """Number of image tokens of one image."""
        return self.image_token_grid**2


def _build_sub_config(
    name: str, value: dict | PreTrainedConfig | None, default_type: str, default_values: dict[str, Any]
) -> PreTrainedConfig:
    """Build a sub-configuration from a dict (by its `model_type`) or from the defaults. Keep one that exists."""
    if isinstance(value, PreTrainedConfig):
        return value
    values = dict(value) if value is not None else dict(default_values)
    model_type = values.pop("model_type", default_type)
    allowed = "a model type that transformers supports"
    require(model_type in CONFIG_MAPPING, f"FusionConfig.{name}.model_type", model_type, allowed)
    return CONFIG_MAPPING[model_type](**values)


FusionConfig.register_for_auto_class()  # saving a model or a processor copies the code files as well

__all__ = ["FusionConfig"]
