"""The tokenizer of `fusion-nano`: byte-level BPE with the 256 bytes and the whole words of the training texts.

A word of the training texts is one token. Other words are split into bytes, so every text can be encoded and decodes
to itself. With `ignore_merges` (as in Llama 3), merge rules and tokens for fragments of words are not needed, so that
training uses every row of the small embedding table.
"""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"  # id 0, which FUSION treats as padding in the instruct ids
END_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, "<|im_start|>", END_TOKEN, "<vision_start>", "<vision_end>", "<image>", "<latent_image>")
MAX_VOCABULARY = 512
MODEL_MAX_LENGTH = 1024
# Texts that the chat template writes around questions and answers.
TEMPLATE_TEXTS = ("system\nYou are a helpful AI assistant.", "user\n", "assistant\n")


def build_tokenizer(
    texts: Iterable[str], max_vocabulary: int = MAX_VOCABULARY, model_max_length: int = MODEL_MAX_LENGTH
) -> PreTrainedTokenizerFast:
    """
    Build a tokenizer from the most frequent words of texts.

    Args:
        texts: Questions, answers and captions of the training records.
        max_vocabulary: Maximum number of tokens, including special tokens.
        model_max_length: Maximum number of tokens of a sequence, which is stored in the tokenizer.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If `max_vocabulary` is too small for the special tokens and the bytes.
    """
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = [*SPECIAL_TOKENS, *byte_symbols]
    if max_vocabulary < len(fixed):
        raise ValueError(f"`max_vocabulary` must be at least {len(fixed)}, got {max_vocabulary}.")
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for text, times in Counter((*TEMPLATE_TEXTS, *texts)).items():
        for word, _ in splitter.pre_tokenize_str(text):
            counts[word] += times
    known = set(fixed)
    by_frequency = sorted((word for word in counts if word not in known), key=lambda word: (-counts[word], word))
    # in alphabetical order, so that the ids do not depend on the frequencies
    tokens = [*fixed, *sorted(by_frequency[: max_vocabulary - len(fixed)])]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], ignore_merges=True))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (PAD_TOKEN, END_TOKEN)],
        model_max_length=model_max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
