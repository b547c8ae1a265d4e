"""FUSION: a tower guided by the question, latent tokens that samplers update between LLM layers, two mapping losses.

Shapes: B batch, P patches per side, N = P * P, T question tokens, Dv tower width, D LLM width, q latent tokens
(`query_len`), w window size, R user turns, S sequence length. Source: FUSION, arXiv 2504.09925.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple, logging

from .configuration_fusion import NUM_CONNECTOR_GROUPS, NUM_TILES, FusionConfig, TokenBudget
from .generation_fusion import FusionGenerationMixin
from .input_checks_fusion import (
    check_embeds_alone,
    check_ids,
    check_image,
    check_labelled_ends,
    check_prompt_inputs,
    check_tiles,
)
from .modeling_fusion_base import (
    CACHE_NAME,
    FusionCausalLMOutputWithPast,
    FusionModelOutputWithPast,
    FusionPreTrainedModel,
    LossCounts,
    MappingLossGradient,
    MappingLossReceiver,
    cache_keyword,
    check_engine,
    chunked_loss,
    either_cache,
)
from .modeling_fusion_decoder import (
    DECODER_LAYERS,
    EmbeddedPrompt,
    FusionSampler,
    PlaceholderMasks,
    decoder_layer,
)
from .modeling_fusion_vision import (
    RECORDED,
    EncodedImage,
    FusionProjector,
    FusionVisionModel,
    Packing,
    blank_pixels,
    encode_blank_image,
    encode_tiles,
    pool_context,
    reduce_grid,
    stitch_tiles,
)
from .turns_fusion import IGNORED, PromptTurns, complete_turns, ignore_placeholders, lacks_turns, order_prompt_ends

logger = logging.get_logger(__name__)
HIDDEN_MAPPING_LOSS = (
    "This training pass has no `labels`, so the gradient of the mapping loss is added to the gradient of the hidden "
    "states, once for each backward pass. If you accumulate gradients over k batches, divide "
    "`config.mapping_loss_weight` by k. Set it to 0 to train without the mapping loss."
)


class FusionModel(FusionPreTrainedModel):
    """The FUSION model without a language head: vision tower, both projectors, and language model with samplers."""

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        for part in (config.text_config, config.vision_config):
            self._check_and_adjust_attn_implementation(part._attn_implementation, is_init_check=True)
        text_width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
        self.vision_tower = FusionVisionModel._from_config(
            config.vision_config, early_layers=config.vision_early_layers
        )
        self.vision_projector = FusionProjector(config, (1 + NUM_CONNECTOR_GROUPS) * vision_width, text_width)
        self.vision_projector_back = FusionProjector(config, text_width, vision_width)
        self.language_model = AutoModel.from_config(config.text_config)
        self._add_samplers()
        self.post_init()

    def _add_samplers(self) -> None:
        """Convert each layer of the language model to one that takes `latent_updates`, and add the samplers."""
        model_type = self.config.text_config.model_type
        if model_type not in DECODER_LAYERS:
            supported = ", ".join(sorted(DECODER_LAYERS))
            raise ValueError(f"`text_config.model_type` must be one of {supported}, got {model_type!r}.")
        for index, layer in enumerate(self.language_model.layers):
            # changing the class keeps the weights: building the layers a second time would double the peak memory
            layer.__class__ = decoder_layer(model_type)
            layer.vision_sampler = FusionSampler(self.config) if index in self.config.sampler_layers else None

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        instruct_input_ids: torch.Tensor | None = None,
        instruct_attention_mask: torch.Tensor | None = None,
        image_token_grid: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        Encode the overviews of images, guided by their questions.

        Args:
            pixel_values (`(B, 5, 3, H, W)`): Tiles and overviews of the images. Only the overviews are encoded.
            instruct_input_ids, instruct_attention_mask (`(B, T)`, *optional*): Questions.
            image_token_grid (`int`, *optional*): Side of the grid of the features. Defaults to the configuration's.

        Returns:
            [`BaseModelOutputWithPooling`]: `pooler_output` are the projected features `(B, image_token_grid ** 2, D)`
            that the language model reads, `last_hidden_state` the last layer of the tower `(B, N, Dv)`. If asked for,
            `hidden_states` and (with eager attention) `attentions` cover patches and question tokens, N + T.
        """
        grid = self.config.grid_side(image_token_grid)
        overview = pixel_values[:, NUM_TILES]
        guided, _, _ = self.guide_tower(overview, instruct_input_ids, instruct_attention_mask, **kwargs)
        patch_features = guided.features[:, : guided.patch_embeddings.shape[1]]  # (B, N, 3 Dv)
        projected = self.vision_projector(patch_features)  # (B, N, D)
        return guided.of_image(reduce_grid(projected, self.config.num_patches_per_side, grid))

    def get_global_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Encode the tiles of images. They can be reused for any number of questions, because no question guides them.

        Args:
            pixel_values (`(B, 5, 3, H, W)` or `(B, 4, 3, H, W)`): Tiles, with or without the overviews.

        Returns:
            `(B, D, 2P, 2P)`: Projected features as one map per image, for `global_features` of `forward`, `generate`.
        """
        check_tiles(self.config, pixel_values)
        features = encode_tiles(self.vision_tower, self.vision_projector, pixel_values[:, :NUM_TILES])
        return stitch_tiles(features, self.config.num_patches_per_side)

    def guide_tower(
        self,
        overview: torch.Tensor,
        instruct_input_ids: torch.Tensor | None,
        instruct_attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Encode `(B, 3, H, W)` with its question. Return the output, question embeddings `(B, T, D)`, and mask."""
        if instruct_input_ids is None:
            instruct_input_ids = torch.zeros(len(overview), 0, dtype=torch.long, device=overview.device)
        mask = instruct_input_ids != self.config.instruct_pad_token_id  # (B, T)
        if instruct_attention_mask is not None:
            mask = mask & instruct_attention_mask.bool()
        instruct_embeds = self.get_input_embeddings()(instruct_input_ids)  # (B, T, D)
        text_embeds, early = self.vision_projector_back(instruct_embeds), self.config.early_text_attention
        guided = self.vision_tower(overview, text_embeds, mask, early_text_attention=early, **kwargs)
        return guided, instruct_embeds, mask

    def encode_image(
        self,
        pixel_values: torch.Tensor,
        instruct_input_ids: torch.Tensor | None,
        instruct_attention_mask: torch.Tensor | None,
        global_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> EncodedImage:
        """Encode the overview `pixel_values[:, -1]` with its question and, without `global_features`, the tiles."""
        if global_features is None and self.vision_tower.takes_tiles(pixel_values, kwargs):
            check_tiles(self.config, pixel_values)
            kwargs["tiles"] = pixel_values[:, :NUM_TILES]
        guided, instruct_embeds, mask = self.guide_tower(
            pixel_values[:, -1], instruct_input_ids, instruct_attention_mask, **kwargs
        )
        num_patches = guided.patch_embeddings.shape[1]
        if guided.tile_features is None:
            projected = self.vision_projector(guided.features)  # (B, N + T, D)
        else:
            packing = Packing.of(guided.features, guided.tile_features)
            packed = packing.join(guided.features, guided.tile_features)
            projected, tile_features = packing.split(self.vision_projector(packed))
            global_features = stitch_tiles(tile_features, self.config.num_patches_per_side)
        if global_features is None:
            global_features = self.get_global_features(pixel_values)
        return EncodedImage(
            image_features=projected[:, :num_patches],
            global_features=global_features.to(projected),
            patch_embeddings=guided.patch_embeddings,
            instruct_embeds=instruct_embeds,
            instruct_features=projected[:, num_patches:],
            instruct_mask=mask,
            guided=guided,
        )

    def compute_mapping_loss(self, image: EncodedImage, counts: LossCounts | None = None) -> torch.Tensor:
        """Compute the mean cosine distances of questions to their features, and of patches to mapped-back tokens."""
        mask = image.instruct_mask
        distance = 1 - nn.functional.cosine_similarity(image.instruct_embeds, image.instruct_features, dim=-1)
        num_tokens = mask.sum() if counts is None else counts.instruct_tokens
        text_loss = torch.where(mask, distance, 0).sum() / num_tokens.clamp(min=1)
        mapped_back = self.vision_projector_back(image.image_features)
        distance = 1 - nn.functional.cosine_similarity(image.patch_embeddings, mapped_back, dim=-1)  # (B, N)
        vision_loss = distance.mean() if counts is None else distance.mean(1).sum() / counts.images
        return text_loss + vision_loss

    def _embed_text(self, input_ids: torch.Tensor, marks: PlaceholderMasks) -> torch.Tensor:
        """Embed ids as `(B, S, D)`. Placeholders in `marks` become zeros, because their ids have no embedding."""
        free = marks.image | marks.latent
        return torch.where(free.unsqueeze(-1), 0, self.get_input_embeddings()(torch.where(free, 0, input_ids)))

    def embed_prompt(
        self,
        input_ids: torch.Tensor,
        *,
        budget: TokenBudget,
        pixel_values: torch.Tensor | None = None,
        instruct_input_ids: torch.Tensor | None = None,
        instruct_attention_mask: torch.Tensor | None = None,
        prompt_end_positions: torch.Tensor | None = None,
        global_features: torch.Tensor | None = None,
        output_mapping_loss: bool = False,
        loss_counts: LossCounts | None = None,
        **kwargs: Any,
    ) -> EmbeddedPrompt:
        """
        Embed a prompt and fill in its image and latent tokens.

        Without an image, latent tokens are zeros, and samplers read a blank image. With `global_features` but without
        `pixel_values`, the prompt continues a cached prompt and uses its image.

        Args:
            input_ids (`(B, S)`), pixel_values, instruct_input_ids, instruct_attention_mask, prompt_end_positions,
                global_features, loss_counts: See [`FusionForConditionalGeneration.forward`]. They are not checked.
            budget ([`TokenBudget`]): Token counts of the call.
            output_mapping_loss (`bool`): Whether to compute the mapping loss.
            kwargs: Outputs that the tower should record.

        Returns:
            [`EmbeddedPrompt`]: Inputs of the language model.
        """
        placeholders = PlaceholderMasks.find(input_ids, self.config)
        inputs_embeds = self._embed_text(input_ids, placeholders)
        ends = None if prompt_end_positions is None or prompt_end_positions.numel() == 0 else prompt_end_positions
        if pixel_values is None and ends is None:
            return EmbeddedPrompt(inputs_embeds)
        outputs: dict[str, Any] = {}
        if pixel_values is None and global_features is not None:
            context = global_features.to(inputs_embeds)
        elif pixel_values is None and not output_mapping_loss:
            context = encode_blank_image(self.vision_tower, self.vision_projector, inputs_embeds)
            context = context.expand(len(input_ids), -1, -1, -1)  # (B, D, 2P, 2P)
        else:
            if pixel_values is None:
                pixel_values = blank_pixels(self.config.vision_config, inputs_embeds, len(input_ids), NUM_TILES + 1)
            image = self.encode_image(
                pixel_values, instruct_input_ids, instruct_attention_mask, global_features, **kwargs
            )
            context, side = image.global_features, self.config.num_patches_per_side
            outputs["image_features"] = reduce_grid(image.image_features, side, budget.image_token_grid)
            outputs["image_outputs"] = image.guided.of_image(outputs["image_features"])
            if output_mapping_loss:
                outputs["mapping_loss"] = self.compute_mapping_loss(image, loss_counts)
        latents, windows = pool_context(context, budget.query_len, self.config.window_size)
        if pixel_values is not None or global_features is None:
            # a sample without image tokens starts from zeros; a sample that continues a cache has an image
            latents = torch.where(placeholders.image.any(1)[:, None, None], latents, 0)
        updates = None if ends is None else placeholders.latent_updates(windows, ends, budget.query_len)
        inputs_embeds = placeholders.fill(inputs_embeds, outputs.get("image_features"), latents)
        return EmbeddedPrompt(inputs_embeds, updates, **outputs)

    def _trust(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        global_features: torch.Tensor | None,
        turns: PromptTurns,
        query_len: int,
    ) -> PromptTurns:
        """Complete turns. Values are read, which breaks a compiled graph, only if something is missing."""
        check_image(self.config, len(input_ids), pixel_values, global_features, query_len)
        if input_ids.shape[1] == 1:  # no turn begins in a later generation step
            return turns
        if lacks_turns(pixel_values, turns):
            return complete_turns(self.config, input_ids, attention_mask, pixel_values, turns)
        ends = turns.prompt_end_positions
        return turns if ends is None else turns._replace(prompt_end_positions=order_prompt_ends(ends, input_ids))

    def _add_mapping_loss(
        self, hidden_states: torch.Tensor, mapping_loss: torch.Tensor, receiver: MappingLossReceiver | None
    ) -> torch.Tensor:
        """Pass the loss to its receiver, or add its gradient to that of the hidden states `(B, S, D)`."""
        if receiver is not None:
            receiver.mapping_loss = mapping_loss
            return hidden_states
        if not torch.compiler.is_compiling():
            logger.warning_once(HIDDEN_MAPPING_LOSS)
        return MappingLossGradient.apply(hidden_states, self.config.mapping_loss_weight * mapping_loss)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        instruct_input_ids: torch.Tensor | None = None,
        instruct_attention_mask: torch.Tensor | None = None,
        prompt_end_positions: torch.Tensor | None = None,
        query_len: int | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_mapping_loss: bool | None = None,
        loss_counts: LossCounts | None = None,
        mapping_loss_receiver: MappingLossReceiver | None = None,
        global_features: torch.Tensor | None = None,
        image_token_grid: int | None = None,
        cache: Cache | None = None,
        check_inputs: bool = True,
        **kwargs: Any,
    ) -> FusionModelOutputWithPast:
        """
        Run the model without its language head. For other arguments, see [`FusionForConditionalGeneration.forward`].

        Args:
            output_mapping_loss (`bool`, *optional*): Whether to return the mapping loss. None adds its gradient to
                that of `last_hidden_state` in a training pass, for callers that compute a loss of their own.
            mapping_loss_receiver ([`MappingLossReceiver`], *optional*): Receives the mapping loss instead.
        """
        cache = either_cache(cache, past_key_values)
        adds_gradient = output_mapping_loss is None and self.training and torch.is_grad_enabled()
        adds_gradient &= self.config.mapping_loss_weight > 0
        check_engine(self.config, cache)
        check_ids(input_ids)
        turns = PromptTurns(prompt_end_positions, instruct_input_ids, instruct_attention_mask)
        if inputs_embeds is not None and input_ids is None:
            check_embeds_alone(pixel_values, global_features, turns)
            prompt = EmbeddedPrompt(inputs_embeds)
        elif input_ids is not None and inputs_embeds is None:
            budget = TokenBudget.of(self.config, query_len, image_token_grid)
            given = (input_ids, attention_mask, pixel_values, global_features, turns)
            if check_inputs and not torch.compiler.is_compiling():
                turns = check_prompt_inputs(self.config, *given, budget, cache)
            else:
                turns = self._trust(*given, budget.query_len)
            prompt = self.embed_prompt(
                input_ids,
                budget=budget,
                pixel_values=pixel_values,
                global_features=global_features,
                output_mapping_loss=bool(output_mapping_loss or adds_gradient),
                loss_counts=loss_counts,
                **turns._asdict(),
                **{name: kwargs[name] for name in RECORDED if name in kwargs},
            )
        else:
            raise ValueError("You must pass exactly one of `input_ids` and `inputs_embeds`.")
        if prompt.latent_updates is not None:
            kwargs["latent_updates"] = prompt.latent_updates
        # masks with four dimensions, or one mask per kind of layer, come with their position ids
        if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # count from the first real token, so that left padding has no effect (long RoPE depends on the length)
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -prompt.inputs_embeds.shape[1] :]

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=prompt.inputs_embeds,
            use_cache=use_cache,
            **cache_keyword(cache),
            **kwargs,
        )
        hidden_states, mapping_loss = outputs.last_hidden_state, prompt.mapping_loss
        if adds_gradient and mapping_loss is not None:
            hidden_states = self._add_mapping_loss(hidden_states, mapping_loss, mapping_loss_receiver)
            mapping_loss = None
        return FusionModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=prompt.image_features,
            mapping_loss=mapping_loss,
            image_outputs=prompt.image_outputs,
            **cache_keyword(getattr(outputs, CACHE_NAME)),
        )


class FusionForConditionalGeneration(FusionPreTrainedModel, FusionGenerationMixin):
    """
    The FUSION model with a language head, for answering questions about images and for training.

    Args:
        config ([`FusionConfig`]): Configuration of the model.

    Example:

    ```python
    >>> from PIL import Image, ImageDraw
    >>> from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
    >>> processor = FusionProcessor.from_pretrained(nano_path())
    >>> model = FusionForConditionalGeneration.from_pretrained(nano_path())
    >>> image = Image.new("RGB", (64, 64), (240, 240, 240))
    >>> ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(220, 30, 30))
    >>> question = {"type": "text", "text": "what color is the shape?"}
    >>> messages = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]
    >>> options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    >>> inputs = processor.apply_chat_template(messages, **options).to(model.device, model.dtype)
    >>> output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    >>> processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    'red'

    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # Trainer would otherwise not divide the loss by the accumulation steps, and overweight the mapping loss
    accepts_loss_kwargs = False

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        self.model = FusionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode the overviews of images, see [`FusionModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def get_global_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode the tiles of images, see [`FusionModel.get_global_features`]."""
        return self.model.get_global_features(pixel_values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Run the model, even if a trainer has replaced `forward` by a function of its own.

        Such a function (TRL's fused language head) computes its loss from the labels and the hidden states of the base
        model. It receives labels without placeholders, and the log-probabilities that it returns carry the gradient of
        the mapping loss.
        """
        if "forward" not in self.__dict__:
            return super().__call__(*args, **kwargs)
        for name in ("labels", "shift_labels"):
            if kwargs.get(name) is not None:
                kwargs[name] = ignore_placeholders(kwargs[name], self.config)
        if kwargs.get("labels") is None or not self.training or not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        receiver = MappingLossReceiver()
        outputs = super().__call__(*args, mapping_loss_receiver=receiver, **kwargs)
        if receiver.mapping_loss is None:
            return outputs  # from the model's own `forward` in a wrapper, whose loss includes the mapping loss
        if not isinstance(outputs, ModelOutput) or not {"log_probs", "label_mask"} <= outputs.keys():
            raise ValueError(
                "The function that replaces `forward` must return `log_probs` and `label_mask`, through which the "
                "mapping loss is trained, but at least one is missing. Set `config.mapping_loss_weight` to 0 to train "
                "without the mapping loss."
            )
        weighted = self.config.mapping_loss_weight * receiver.mapping_loss
        outputs.log_probs = MappingLossGradient.apply(outputs.log_probs, weighted, outputs.label_mask)
        if outputs.get("loss") is not None:
            outputs.loss = outputs.loss + weighted
        return outputs

    def _language_loss(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor | None,
        labels: torch.Tensor,
        shift_labels: torch.Tensor | None,
        loss_positions: torch.Tensor | None,
        loss_counts: LossCounts | None,
    ) -> torch.Tensor:
        """Compute the loss `()` from logits, or from hidden states `(B, S, D)` at `loss_positions`, see `forward`."""
        vocab_size = self.config.text_config.vocab_size
        # without any label, the mean over a whole batch would be NaN, but the loss of a part is zero
        num_labels = None if loss_counts is None else loss_counts.labels.clamp(min=1)
        if loss_positions is None:
            settings = {"vocab_size": vocab_size, "shift_labels": shift_labels, "num_items_in_batch": num_labels}
            return self.loss_function(logits=logits, labels=labels, **settings)
        targets = labels.flatten().index_select(0, loss_positions + 1)  # (M,)
        return chunked_loss(
            self.lm_head,
            self.loss_function,
            hidden_states.flatten(0, 1).index_select(0, loss_positions),  # (M, D)
            targets,
            vocab_size=vocab_size,
            num_labels=(targets != IGNORED).sum() if num_labels is None else num_labels,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        instruct_input_ids: torch.Tensor | None = None,
        instruct_attention_mask: torch.Tensor | None = None,
        prompt_end_positions: torch.Tensor | None = None,
        query_len: int | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        # no name that contains `label`: Trainer would treat it as another kind of labels
        loss_positions: torch.Tensor | None = None,
        loss_counts: LossCounts | None = None,
        global_features: torch.Tensor | None = None,
        image_token_grid: int | None = None,
        cache: Cache | None = None,
        check_inputs: bool = True,
        **kwargs: Any,
    ) -> FusionCausalLMOutputWithPast:
        """
        Run the model and, with `labels`, compute the loss.

        Args:
            input_ids (`(B, S)`): Ids with `image_token_grid ** 2` image tokens, and one latent block of `query_len`
                tokens per user turn. The image comes before the first latent block.
            attention_mask (`(B, S)`): Mask of the padding, on the left or on the right.
            pixel_values (`(B, 5, 3, H, W)`, *optional*): Four tiles and the overview of each image. Samples without
                image tokens in a mixed batch have zeros here, and their latent tokens are zeros.
            instruct_input_ids, instruct_attention_mask (`(B, T)`, *optional*): Questions. By default, they are found
                in `input_ids`. Pass an empty `(B, 0)` tensor for no question.
            prompt_end_positions (`(B, R)`, *optional*): Index in `input_ids` of the last prompt token of each turn,
                padded with -1. Turn t belongs to latent block t. Blocks without a turn are not updated. By default,
                turns are found in `input_ids`. Pass an empty `(B, 0)` tensor to update no block.
            query_len (`int`, *optional*): Number of latent tokens per turn. Defaults to the configuration's.
            labels (`(B, S)`, *optional*): Labels of the language loss. -100 and placeholders are ignored. Trainers
                that split sequences also pass `shift_labels`, which are already aligned with the logits.
            loss_positions (`(M,)`, *optional*): Positions `row * S + position` whose next token is a label in the same
                row. Only these enter the loss, which is computed in chunks, and no logits are returned.
            loss_counts ([`LossCounts`], *optional*): Denominators of the means if this is a part of a batch.
            global_features (`(B, D, 2P, 2P)`, *optional*): Features from `get_global_features`, one row per sample, on
                any device. Max-pooling them to the side `isqrt(query_len) * window_size` changes nothing. Only the
                overviews are encoded then, and `pixel_values` may be these alone `(B, 1, 3, H, W)`. Without
                `pixel_values`, `input_ids` continue a cache that holds the images, and `prompt_end_positions` are
                those of the new turns.
            image_token_grid (`int`, *optional*): Side of the grid of image tokens. Defaults to the configuration's.
            cache ([`Cache`], *optional*): Another name of `past_key_values`, as in transformers since 5.24.
            check_inputs (`bool`): Whether to check values. Pass False for inputs that are already checked, as
                `FusionDataCollator` does in training. Shapes are still checked, but nothing waits for a GPU.

        Raises:
            ValueError: If ids, images, blocks and turns disagree. The message names both counts.
        """
        shift_labels = ignore_placeholders(kwargs.pop("shift_labels", None), self.config)
        labels = ignore_placeholders(labels, self.config)
        looks = check_inputs and not torch.compiler.is_compiling()
        if looks and labels is not None and prompt_end_positions is not None and input_ids is not None:
            check_labelled_ends(input_ids, labels, prompt_end_positions, self.config)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            instruct_input_ids=instruct_input_ids,
            instruct_attention_mask=instruct_attention_mask,
            prompt_end_positions=prompt_end_positions,
            query_len=query_len,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_mapping_loss=True if labels is not None else None,
            loss_counts=loss_counts,
            global_features=global_features,
            image_token_grid=image_token_grid,
            cache=either_cache(cache, past_key_values),
            check_inputs=check_inputs,
            **kwargs,
        )
        logits = None
        if labels is None or loss_positions is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = language_loss = None
        if labels is not None:
            states = outputs.last_hidden_state
            language_loss = self._language_loss(states, logits, labels, shift_labels, loss_positions, loss_counts)
            weight = self.config.mapping_loss_weight
            loss = language_loss if outputs.mapping_loss is None else language_loss + weight * outputs.mapping_loss
        return FusionCausalLMOutputWithPast(
            loss=loss,
            language_loss=language_loss,
            mapping_loss=outputs.mapping_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            **cache_keyword(getattr(outputs, CACHE_NAME)),
        )


# saving a model then copies the code files as well
FusionModel.register_for_auto_class("AutoModel")
FusionForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["FusionForConditionalGeneration", "FusionModel", "FusionPreTrainedModel"]
