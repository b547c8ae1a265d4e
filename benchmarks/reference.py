"""The comparison: the same FUSION computed the way the authors' released code computes it.

Written anew from the method, not copied, and kept as fast as the method allows: weights, inputs, language model and
everything that is not named below are ours. What is the authors' method:

- the tower keeps the hidden states of all layers, and the connector stacks each group of them;
- attention in the tower is eager: scores, additive mask and a float32 softmax are whole matrices;
- the question's mask is materialised for all (N + T) x (N + T) pairs, and early layers overwrite the question's rows;
- a sampler copies the windows of the global context once per turn and computes keys and values from every copy.

Left out in the reference's favour, although the authors' code does it: the unused layer norm behind the tower,
unfolding the windows again in every sampler; at inference, mapping the image tokens back for a loss that is not taken,
and logits of the whole prompt. In training, all logits are computed, as theirs are. The samplers' attention is
`scaled_dot_product_attention` in their code too.
"""

from typing import Any

import torch
from torch import nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings
from workload import sharing_copy

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_decoder import FusionSampler, LatentUpdates
from fusion_hf.model.modeling_fusion_vision import FusionVisionModelOutput


class ReferenceAttention(nn.Module):
    """Eager attention with a float32 softmax."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, uniform_from: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute attention.

        Args:
            hidden_states (`(B, S, Dv)`): the hidden states.
            attention_mask (`(B, 1, S, S)`, *optional*): added to the scores.
            uniform_from (`int`, *optional*): rows from here on get one constant for all scores.
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale  # (B, heads, S, S)
        if attention_mask is not None:
            scores = scores + attention_mask
        if uniform_from is not None:
            scores[:, :, uniform_from:] = torch.finfo(scores.dtype).min
        # float32 even if the model is in half precision, as in the authors' code
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        output = torch.matmul(weights, value).transpose(1, 2).flatten(2)
        # the weights are returned, so a layer holds them until it ends, as the authors' and transformers' layers do
        return self.out_proj(output), weights


class ReferenceLayer(SiglipEncoderLayer):
    """transformers' layer with another attention."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.self_attn = ReferenceAttention(config)


class ReferenceVisionModel(nn.Module):
    """Tower and connector with the parameter names of `FusionVisionModel`, so that its weights load."""

    splits_on_cpu = False  # the authors' code processes all tiles in a layer at once

    def __init__(self, config: SiglipVisionConfig, early_layers: int):
        super().__init__()
        self.early_layers = early_layers
        self.embeddings = SiglipVisionEmbeddings(config)
        self.layers = nn.ModuleList([ReferenceLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        pixel_values: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        early_text_attention: str = "uniform_padded",
    ) -> FusionVisionModelOutput:
        """See `FusionVisionModel.forward`; the authors have only `"uniform_padded"`, which equals `"uniform"` here."""
        patch_embeddings = self.embeddings(pixel_values)  # (B, N, Dv)
        hidden_states, attention_mask, uniform_from = patch_embeddings, None, None
        if text_embeds is not None and text_mask is not None:
            uniform_from = patch_embeddings.shape[1]
            hidden_states = torch.cat([patch_embeddings, text_embeds], dim=1)  # (B, N + T, Dv)
            key_mask = nn.functional.pad(text_mask, (uniform_from, 0), value=True)  # (B, N + T)
            batch, length = key_mask.shape
            # made once per image, as in the authors' code, with a value for every pair
            attention_mask = hidden_states.new_zeros(batch, 1, length, length)
            attention_mask.masked_fill_(~key_mask[:, None, None], torch.finfo(hidden_states.dtype).min)
        states = [hidden_states]
        for index, layer in enumerate(self.layers):
            early = index < self.early_layers
            states.append(layer(states[-1], attention_mask, uniform_from=uniform_from if early else None))
        return FusionVisionModelOutput(self.connect(states), patch_embeddings)

    def takes_tiles(self, pixel_values: torch.Tensor, asked: dict[str, Any]) -> bool:
        """The authors call the tower once for tiles and once for overviews."""
        return False

    def connect(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Convert all hidden states `(B, S, Dv)` to `(B, S, 3 * Dv)`."""
        size = self.early_layers
        # one stack at a time, so that the first is freed before the second is made
        means = [torch.stack(states[start : start + size]).sum(0) / size for start in (0, size)]
        return torch.cat([states[-1], *means], dim=-1)


class ReferenceSampler(FusionSampler):
    """The sampler with one copy of the windows per turn, and the same parameters."""

    def forward(self, hidden_states: torch.Tensor, updates: LatentUpdates) -> torch.Tensor:
        """Rewrite hidden states `(B, S, D)`."""
        batch, turns, latents = updates.latent_positions.shape
        width = hidden_states.shape[-1]
        rows = torch.arange(batch, device=hidden_states.device)
        previous = hidden_states[rows[:, None, None], updates.latent_positions]  # (B, R, q, D)
        questions = hidden_states[rows[:, None], updates.prompt_end_positions]  # (B, R, D)
        questions = questions.unsqueeze(2).expand_as(previous)
        inputs = self.proj_in(torch.cat([questions, previous], dim=-1))  # (B, R, q, D)

        windows = updates.windows.to(inputs.dtype).unsqueeze(1).expand(-1, turns, -1, -1, -1).contiguous()
        context = self.proj_context(windows.flatten(0, 2))  # (B * R * q, w * w, D)
        query = self.q_proj(self.q_norm(inputs.flatten(0, 2).unsqueeze(1)))  # (B * R * q, 1, D)
        key, value = self.k_proj(self.k_norm(context)), self.v_proj(self.v_norm(context))
        heads = (self.num_heads, width // self.num_heads)
        query, key, value = (x.unflatten(-1, heads).transpose(1, 2) for x in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).reshape(batch, turns, latents, width)

        outputs = self.norm(self.o_proj(attended) + inputs)
        latent_states = self.linear_2(self.act(self.linear_1(outputs))) + previous
        samples, valid_turns = updates.valid.nonzero(as_tuple=True)
        changed = hidden_states.clone()
        positions = updates.latent_positions[samples, valid_turns]  # (valid turns, q)
        changed[samples[:, None], positions] = latent_states[samples, valid_turns].to(changed.dtype)
        return changed


def build_reference(model: FusionForConditionalGeneration) -> FusionForConditionalGeneration:
    """Build a model that shares the weights of `model`, and computes tower and samplers as described above."""
    reference = sharing_copy(model)
    config, ours = model.config, model.model.vision_tower
    with torch.device("meta"):  # allocates nothing, since the weights are shared
        tower = ReferenceVisionModel(config.vision_config, config.vision_early_layers)
        samplers = {index: ReferenceSampler(config) for index in config.sampler_layers}
    tower.embeddings = ours.embeddings
    adopt_weights(tower, ours)
    reference.model.vision_tower = tower
    for index, sampler in samplers.items():
        adopt_weights(sampler, model.model.language_model.layers[index].vision_sampler)
        reference.model.language_model.layers[index].vision_sampler = sampler
    return reference.train(model.training)


def adopt_weights(module: nn.Module, other: nn.Module) -> None:
    """Share the parameters of `module` with `other`."""
    module.load_state_dict(other.state_dict(keep_vars=True), assign=True)
