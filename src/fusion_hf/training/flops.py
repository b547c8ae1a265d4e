"""Count the floating-point operations (FLOPs) of FUSION's matrix products, for model-FLOPs utilization and planning.

A product of `(m, k)` and `(k, n)` counts as `2 m k n`. Attention counts as its full square, even where it is causal.
Only matrix products and the patch convolution count: norms, activations, softmax, pooling and LoRA adapters are left
out. In the backward pass, each product with a weight costs its forward FLOPs once for the gradient of the weight and
once for the gradient of the input. Gradients that a batch does not need are not counted. Gradient checkpointing
recomputes each layer up to the input of its last product.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from fusion_hf.model.configuration_fusion import NUM_CONNECTOR_GROUPS, NUM_TILES, FusionConfig
from fusion_hf.training.parameter_groups import LANGUAGE_MODEL, PARTS, PROJECTORS, SAMPLERS, VISION_TOWER


@dataclass(frozen=True)
class BatchShape:
    """
    The shape of one micro-batch, padding included.

    Args:
        batch: the number of samples.
        sequence: the number of tokens per sample in the language model (S), including image and latent tokens.
        instruct_tokens: the number of question tokens that the vision tower reads (T).
        turns: the number of user turns (R).
        query_len: the number of latent tokens of each turn (q).
    """

    batch: int
    sequence: int
    instruct_tokens: int
    turns: int
    query_len: int


@dataclass
class StepFlops:
    """
    The FLOPs of one forward and backward pass of a micro-batch.

    Args:
        forward: the FLOPs of the forward pass.
        by_part: the same for each part of the model.
        training: the FLOPs of forward and backward, the numerator of model-FLOPs utilization.
        recomputed: the FLOPs that gradient checkpointing adds to `training`.
    """

    forward: int = 0
    training: int = 0
    recomputed: int = 0
    by_part: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))


def step_flops(
    config: FusionConfig, shape: BatchShape, trained: Collection[str] = PARTS, adapted: Collection[str] = ()
) -> StepFlops:
    """
    Count the FLOPs of one micro-batch.

    Args:
        config: the configuration of the model.
        shape: the shape of the micro-batch.
        trained: the parts of `PARTS` whose weights are trained. The weights of other parts get no gradient, and their
            inputs get one only if a trained part comes before them.
        adapted: the parts with adapters. Gradients pass through all of them.

    Returns:
        The FLOPs.
    """
    counter = _Counter(config, shape, frozenset(trained), frozenset(adapted))
    counter.count()
    return counter.total


class _Counter:
    """Follow the forward pass. Arguments named `*_gradient` say whether a tensor requires a gradient."""

    def __init__(self, config: FusionConfig, shape: BatchShape, trained: frozenset[str], adapted: frozenset[str]):
        self.config, self.shape, self.trained, self.adapted = config, shape, trained, adapted
        self.patches = config.num_patches_per_side**2
        self.total = StepFlops()

    def product(self, part: str, flops: int, gradient: bool, in_layer: bool = True, weighs: bool = False) -> None:
        """
        Count a matrix product of a part.

        Args:
            part: the part of the model.
            flops: the FLOPs of the forward pass.
            gradient: whether the input requires a gradient.
            in_layer: whether gradient checkpointing recomputes the product.
            weighs: whether one factor is a weight. Otherwise both are activations.
        """
        second = part in self.trained if weighs else gradient
        self.total.forward += flops
        self.total.by_part[part] += flops
        self.total.training += flops * (1 + second + gradient)
        if in_layer and (second or gradient):
            self.total.recomputed += flops

    def linear(self, part: str, rows: int, size: tuple[int, int], gradient: bool, in_layer: bool = False) -> bool:
        """
        Count a linear layer with a weight of `size` on `rows` rows, and return whether its output requires a
        gradient.
        """
        self.product(part, 2 * rows * size[0] * size[1], gradient, in_layer, weighs=True)
        return gradient or part in self.trained or part in self.adapted

    def attention(self, part: str, count: int, rows: int, keys: int, width: int, gradient: bool) -> None:
        """Count the scores and weighted sums of `count` attentions, with all heads together `width` wide."""
        self.product(part, 2 * 2 * count * rows * keys * width, gradient)

    def count(self) -> None:
        batch, questions = self.shape.batch, self.shape.instruct_tokens
        text_gradient = LANGUAGE_MODEL in self.trained  # this includes the embeddings
        widths = (self.config.text_config.hidden_size, self.config.vision_config.hidden_size)
        back_gradient = False
        if questions > 0:
            back_gradient = self.projector(batch * questions, *widths, text_gradient)
        overview_gradient = self.tower(batch, questions, back_gradient)
        tile_gradient = self.tower(NUM_TILES * batch, 0, False)

        connected = (1 + NUM_CONNECTOR_GROUPS) * widths[1]
        rows = self.patches + questions
        image_gradient = self.projector(batch * rows, connected, widths[0], overview_gradient)
        window_gradient = self.projector(NUM_TILES * batch * self.patches, connected, widths[0], tile_gradient)
        self.projector(batch * self.patches, *widths, image_gradient)  # the mapping loss
        self.language_model(text_gradient or image_gradient or window_gradient, window_gradient)

    def projector(self, rows: int, inputs: int, outputs: int, gradient: bool) -> bool:
        gradient = self.linear(PROJECTORS, rows, (inputs, outputs), gradient)
        return self.linear(PROJECTORS, rows, (outputs, outputs), gradient)

    def tower(self, count: int, questions: int, gradient: bool) -> bool:
        """Count the vision tower over `count` images with their questions."""
        vision = self.config.vision_config
        width, mlp = vision.hidden_size, vision.intermediate_size
        pixels = vision.num_channels * vision.patch_size**2
        gradient |= self.linear(VISION_TOWER, count * self.patches, (pixels, width), False)
        length = self.patches + questions
        for layer in range(vision.num_hidden_layers):
            given = gradient
            for _ in range(4):  # query, key, value, output
                gradient = self.linear(VISION_TOWER, count * length, (width, width), gradient, True)
            self.attention(VISION_TOWER, count, length, length, width, gradient)
            if questions > 0 and layer < self.config.vision_early_layers:
                self.early_text(count, length, width, given)
            gradient = self.linear(VISION_TOWER, count * length, (width, mlp), gradient, True)
            gradient = self.linear(VISION_TOWER, count * length, (mlp, width), gradient)
        return gradient

    def early_text(self, count: int, length: int, width: int, gradient: bool) -> None:
        """
        Count what early layers compute for question rows (uniform attention) or for patches that do not see them
        (masked).
        """
        if self.config.early_text_attention == "masked":
            for _ in range(4):
                self.linear(VISION_TOWER, count * self.patches, (width, width), gradient, True)
            gradient |= VISION_TOWER in self.trained
            self.attention(VISION_TOWER, count, self.patches, self.patches, width, gradient)
            return
        self.product(VISION_TOWER, 2 * count * length * width, gradient=False)  # the uniform weights need no gradient
        for _ in range(2):  # value, output
            self.linear(VISION_TOWER, count, (width, width), gradient, True)

    def language_model(self, gradient: bool, window_gradient: bool) -> None:
        text = self.config.text_config
        width, mlp = text.hidden_size, text.intermediate_size
        # some configurations lack `head_dim`, and some set it to None
        head = text.to_dict().get("head_dim") or width // text.num_attention_heads
        queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
        rows = self.shape.batch * self.shape.sequence
        gradient |= LANGUAGE_MODEL in self.adapted
        for layer in range(text.num_hidden_layers):
            for size in ((width, queries), (width, keys), (width, keys), (queries, width)):
                self.linear(LANGUAGE_MODEL, rows, size, gradient, True)
            inner = gradient or LANGUAGE_MODEL in self.trained
            length = self.shape.sequence
            self.attention(LANGUAGE_MODEL, self.shape.batch, length, length, queries, inner)
            has_sampler = layer in self.config.sampler_layers and self.shape.turns > 0
            for _ in range(2):
                self.linear(LANGUAGE_MODEL, rows, (width, mlp), inner, True)
            gradient = self.linear(LANGUAGE_MODEL, rows, (mlp, width), inner, has_sampler)
            if has_sampler:
                gradient = self.sampler(gradient, window_gradient)
        self.linear(LANGUAGE_MODEL, rows, (width, text.vocab_size), gradient)

    def sampler(self, gradient: bool, window_gradient: bool) -> bool:
        """Count one sampler. Windows are projected once per image, and all turns attend to them."""
        width, window = self.config.text_config.hidden_size, self.config.window_size**2
        cells = self.shape.batch * self.shape.query_len
        latents, square = cells * self.shape.turns, (width, width)
        context = self.linear(SAMPLERS, cells * window, square, window_gradient, True)
        for _ in range(2):  # key, value
            self.linear(SAMPLERS, cells * window, square, context, True)
        inputs = self.linear(SAMPLERS, latents, (2 * width, width), gradient, True)
        self.linear(SAMPLERS, latents, square, inputs, True)  # query
        inner = inputs or context
        self.attention(SAMPLERS, cells, self.shape.turns, window, width, inner)
        for in_layer in (True, True, False):  # output and the two of the MLP
            self.linear(SAMPLERS, latents, square, inner, in_layer)
        return inner
