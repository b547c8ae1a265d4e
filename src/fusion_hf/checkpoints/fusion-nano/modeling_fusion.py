"""FUSION: a tower guided by the question, latent tokens that samplers rewrite between LLM layers, two mapping losses.

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
    """Tower, both projectors and the language model, without the language head."""

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
        """Make every layer of the LLM one that knows `latent_updates`, and give some of them a sampler."""
        model_type = self.config.text_config.model_type
        if model_type not in DECODER_LAYERS:
            supported = ", ".join(sorted(DECODER_LAYERS))
            raise ValueError(f"text_config.model_type is {model_type!r}; FUSION supports: {supported}.")
        for index, layer in enumerate(self.language_model.layers):
            # same weights, one more keyword: building the layers a second time would double the peak memory
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
        Encode the overviews of images `(B, 5, 3, H, W)` under their questions `(B, T)`.

        Returns `pooler_output`, the projected features `(B, image_token_grid ** 2, D)` that the LLM reads, and
        `last_hidden_state`, the tower's last layer `(B, N, Dv)`. The tower's `hidden_states` and (with eager
        attention) `attentions`, if asked for, are those of patches and question tokens, N + T.
        """
        grid = self.config.grid_side(image_token_grid)
        overview = pixel_values[:, NUM_TILES]
        guided, _, _ = self.guide_tower(overview, instruct_input_ids, instruct_attention_mask, **kwargs)
        patch_features = guided.features[:, : guided.patch_embeddings.shape[1]]  # (B, N, 3 Dv)
        projected = self.vision_projector(patch_features)  # (B, N, D)
        return guided.of_image(reduce_grid(projected, self.config.num_patches_per_side, grid))

    def get_global_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Encode the tiles of images, `(B, 5, 3, H, W)` or without the overview `(B, 4, 3, H, W)`.

        Returns their projected features as one map per image `(B, D, 2P, 2P)`. No question guides them, so that
        [`forward`] and `generate` take them, as `global_features`, for any number of questions.
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
        """The tower's output for `(B, 3, H, W)` and its question; the question's embeddings `(B, T, D)` and mask."""
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
        """
        Tower and projector over the overview `pixel_values[:, -1]` with its question and, unless their features are
        given, over the four tiles without it.
        """
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
        """Mean cosine distances of question and features, and of patch embeddings and mapped-back image tokens."""
        mask = image.instruct_mask
        distance = 1 - nn.functional.cosine_similarity(image.instruct_embeds, image.instruct_features, dim=-1)
        num_tokens = mask.sum() if counts is None else counts.instruct_tokens
        text_loss = torch.where(mask, distance, 0).sum() / num_tokens.clamp(min=1)
        mapped_back = self.vision_projector_back(image.image_features)
        distance = 1 - nn.functional.cosine_similarity(image.patch_embeddings, mapped_back, dim=-1)  # (B, N)
        vision_loss = distance.mean() if counts is None else distance.mean(1).sum() / counts.images
        return text_loss + vision_loss

    def _embed_text(self, input_ids: torch.Tensor, marks: PlaceholderMasks) -> torch.Tensor:
        """Embeddings `(B, S, D)`; zeros where `marks` keep places free, whose ids have no embedding."""
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
        Embed a prompt, with image and latent tokens in place.

        Without images, latent tokens are zeros, and samplers see a blank image. With `global_features` and without
        `pixel_values`, the prompt continues one that is in a cache, with its image.

        Args:
            input_ids (`(B, S)`), pixel_values, instruct_input_ids, instruct_attention_mask, prompt_end_positions,
                global_features, loss_counts: see [`FusionForConditionalGeneration.forward`]. They are not checked.
            budget ([`TokenBudget`]): of the call.
            output_mapping_loss (`bool`): whether to compute it.
            kwargs: what the tower is to record.

        Returns:
            [`EmbeddedPrompt`]: what enters the language model.
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
            # a sample without image tokens starts from zero latents; one in a cache has an image
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
        """Complete turns without reading a value, which breaks a compiled graph, unless something is missing."""
        check_image(self.config, len(input_ids), pixel_values, global_features, query_len)
        if input_ids.shape[1] == 1:  # no turn begins in a later step of generation
            return turns
        if lacks_turns(pixel_values, turns):
            return complete_turns(self.config, input_ids, attention_mask, pixel_values, turns)
        ends = turns.prompt_end_positions
        return turns if ends is None else turns._replace(prompt_end_positions=order_prompt_ends(ends, input_ids))

    def _add_mapping_loss(
        self, hidden_states: torch.Tensor, mapping_loss: torch.Tensor, receiver: MappingLossReceiver | None
    ) -> torch.Tensor:
        """Hand it to its receiver, or return hidden states (B, S, H) whose gradient it is added to."""
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
        Run the model without its language head, see [`FusionForConditionalGeneration.forward`].

        Args:
            output_mapping_loss (`bool`, *optional*): True returns the mapping loss. None adds its gradient to that of
                `last_hidden_state` in a training pass, for callers that make a loss of their own.
            mapping_loss_receiver ([`MappingLossReceiver`], *optional*): takes the mapping loss instead.
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
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if prompt.latent_updates is not None:
            kwargs["latent_updates"] = prompt.latent_updates
        # a mask of four dimensions, or one for each kind of layer, comes with its position ids
        if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # count from the first real token, so that left padding changes nothing (long RoPE depends on lengths)
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
    FUSION with its language head: answers questions about images, and trains.

    Args:
        config ([`FusionConfig`]): of the model.

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
    # Trainer would else stop dividing the loss by the accumulation steps, and the mapping loss would weigh too much
    accepts_loss_kwargs = False

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        self.model = FusionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See [`FusionModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def get_global_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See [`FusionModel.get_global_features`]."""
        return self.model.get_global_features(pixel_values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Run the model, also where a trainer has put a function of its own in place of `forward`.

        Such a function (TRL's fused language head) makes its loss of the labels and of the base model's hidden
        states. It gets labels without placeholders, and the log-probabilities that it returns carry the gradient of
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
            return outputs  # of the model's own `forward` behind a wrapper, whose loss has the mapping loss
        if not isinstance(outputs, ModelOutput) or not {"log_probs", "label_mask"} <= outputs.keys():
            raise ValueError(
                "The `forward` that was put in place of the model's own returns no `log_probs` and `label_mask`, "
                "through which the mapping loss could be trained. Set `config.mapping_loss_weight` to 0 to train "
                "without it."
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
        """Of logits, or of the hidden states `(B, S, D)` at `loss_positions`, see `forward`; `()`."""
        vocab_size = self.config.text_config.vocab_size
        # without a single label, the mean of the whole batch would be no number, that of a part is zero
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
        # no name with `label` in it: Trainer would take it for another kind of labels
        loss_positions: torch.Tensor | None = None,
        loss_counts: LossCounts | None = None,
        global_features: torch.Tensor | None = None,
        image_token_grid: int | None = None,
        cache: Cache | None = None,
        check_inputs: bool = True,
        **kwargs: Any,
    ) -> FusionCausalLMOutputWithPast:
        """
        Args:
            input_ids (`(B, S)`): `image_token_grid ** 2` image tokens; latent blocks of `query_len` tokens, one per
                user turn; the image before the first latent block.
            attention_mask (`(B, S)`): padded left or right.
            pixel_values (`(B, 5, 3, H, W)`, *optional*): four tiles and the overview. A sample without image tokens in
                a mixed batch carries zeros, and its latents are zeros.
            instruct_input_ids, instruct_attention_mask (`(B, T)`, *optional*): the questions; T may be 0. Without
                them the questions are found in `input_ids`; an empty `(B, 0)` tensor is no question.
            prompt_end_positions (`(B, R)`, *optional*): index in `input_ids` of each turn's last prompt token, -1
                padded. Turn t belongs to latent block t; blocks beyond the last given turn stay as they are. Without
                them the turns are found in `input_ids`; an empty `(B, 0)` tensor leaves all blocks as they are.
            query_len (`int`, *optional*): None reads it from the configuration.
            labels (`(B, S)`, *optional*): -100 is ignored, and so are image and latent placeholders. Trainers that
                split sequences also give `shift_labels`, which are aligned with the logits already.
            loss_positions (`(M,)`, *optional*): where labelled tokens are predicted, `row * S + position`: the token
                behind each is a label of the same row. The loss is computed of these alone, some at a time, and no
                logits are returned.
            loss_counts ([`LossCounts`], *optional*): what the means are taken over, where this is a part of a batch.
            global_features (`(B, D, 2P, 2P)`, *optional*): what `get_global_features` gave for the images, one row
                per sample, on any device. They may be max-pooled to the side `isqrt(query_len) * window_size`, which
                changes nothing. Only the overview is encoded then, the last of `pixel_values`, which may be the
                overviews alone `(B, 1, 3, H, W)`. Without `pixel_values`: `input_ids` continue `past_key_values`,
                which hold each sample's image, and `prompt_end_positions` are those of the new turns.
            image_token_grid (`int`, *optional*): side of the grid that image features are resized to, 1 to P; None
                reads it from the configuration.
            cache ([`Cache`], *optional*): another name of `past_key_values`, as in transformers since 5.24.
            check_inputs (`bool`): False for inputs that were checked before, as `FusionDataCollator` does for a
                training step: shapes are compared all the same, but no value, so that nothing waits for a GPU.

        Raises:
            ValueError: where ids, images, blocks and turns disagree (with both counts).
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


# so that saving a model brings the code files along
FusionModel.register_for_auto_class("AutoModel")
FusionForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["FusionForConditionalGeneration", "FusionModel", "FusionPreTrainedModel"]
