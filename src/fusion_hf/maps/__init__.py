"""Attention maps: attention from questions, latent tokens and answers to the image."""

from fusion_hf.maps.attention import AttentionMaps, attention_maps
from fusion_hf.maps.view import Maps, View, Word

__all__ = ["AttentionMaps", "Maps", "View", "Word", "attention_maps"]
