"""A stand-in for the flash-attn package on a CPU: the same two functions, which check what they are given."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

NAME = "flash_stand_in"
LARGEST_HEAD = 256


@dataclass
class FlashStandIn:
    """
    Registered as an attention implementation, with transformers' own code around it, which takes padding out.

    `packed` holds, for every call with sequences of different lengths, how many queries and keys were given;
    `whole` the shapes `(B, S)` of the queries of all other calls.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    packed: list[tuple[int, int]] = field(default_factory=list)
    whole: list[tuple[int, int]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """Register it for one test; returns its name."""
        utils = modeling_flash_attention_utils
        functions = (self.flash_attn_func, self.flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
        monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
        monkeypatch.setattr(utils, "_loaded_implementation", None)
        monkeypatch.setitem(AttentionInterface._global_mapping, NAME, flash_attention_forward)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, NAME, flash_attention_mask)
        return NAME

    def flash_attn_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> torch.Tensor:
        """`(B, S, heads, size)`; causal masks are aligned at the last query and the last key."""
        assert q.ndim == k.ndim == v.ndim == 4
        assert len(q) == len(k) == len(v)
        self.whole.append(tuple(q.shape[:2]))
        self.check(q, k, v)
        rows = [self.attend(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> torch.Tensor:
        """Sequences one behind the other, `(tokens, heads, size)`, between the bounds `(B + 1)`."""
        assert q.ndim == k.ndim == v.ndim == 3
        self.packed.append((len(q), len(k)))
        self.check(q, k, v)
        for bounds, longest, tokens in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
            assert bounds.dtype == torch.int32 and bounds.device == tokens.device and bounds.is_contiguous()
            lengths = bounds.diff()
            assert bounds[0] == 0 and bounds[-1] == len(tokens) and bool((lengths >= 0).all())
            assert int(longest) >= int(lengths.max())
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        rows = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        return torch.cat([self.attend(*row, softmax_scale, causal, window_size) for row in rows])

    def check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        assert q.dtype == k.dtype == v.dtype and q.dtype in self.dtypes, q.dtype
        assert q.device == k.device == v.device
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v)), "the last dimension must be contiguous"
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= LARGEST_HEAD
        assert k.shape == v.shape and q.shape[-2] % k.shape[-2] == 0
        assert q.shape[0] > 0

    @staticmethod
    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        causal: bool,
        window: tuple[int, int],
    ) -> torch.Tensor:
        """One sequence, `(S, heads, size)`, in float32."""
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        mask = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            mask &= distance >= 0
        if window[0] >= 0:
            mask &= distance <= window[0]
        if window[1] >= 0:
            mask &= -distance <= window[1]
        query, key, value = (tensor.float().transpose(0, 1) for tensor in (q, k, v))
        key, value = (tensor.repeat_interleave(len(query) // len(key), 0) for tensor in (key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        return attended.transpose(0, 1).to(q.dtype)
