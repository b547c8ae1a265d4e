"""The tokenizer of `fusion-nano`: byte-level BPE over the 256 bytes and the whole words of the training texts.

A word of the training texts is one token; anything else falls back to its bytes, so every text can be encoded and
decodes to itself. `ignore_merges` (as in Llama 3) makes merge rules, and the fragments of words that they
need as tokens of their own, unnecessary: each of the few rows of the embedding table is used in training.
"""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"  # id 0: the value that FUSION treats as padding in the instruct ids
END_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, "<|im_start|>", END_TOKEN, "<vision_start>", "<vision_end>", "<image>", "<latent_image>")
MAX_VOCABULARY = 512
MODEL_MAX_LENGTH = 1024
# What the chat template writes around the questions and answers.
TEMPLATE_TEXTS = ("system\nYou are a helpful AI assistant.", "user\n", "assistant\n")


def build_tokenizer(
    texts: Iterable[str], max_vocabulary: int = MAX_VOCABULARY, model_max_length: int = MODEL_MAX_LENGTH
) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the most frequent words of `texts`.

    Args:
        texts: questions, answers and captions of the training records.
        max_vocabulary: upper limit of the number of tokens, special tokens included.
        model_max_length: stored with the tokenizer, in tokens.

    Raises:
        ValueError: if `max_vocabulary` has no room for the special tokens and the bytes.
    """
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = [*SPECIAL_TOKENS, *byte_symbols]
    if max_vocabulary < len(fixed):
        raise ValueError(f"max_vocabulary is {max_vocabulary}, allowed is {len(fixed)} or more")
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for text, times in Counter((*TEMPLATE_TEXTS, *texts)).items():
        for word, _ in splitter.pre_tokenize_str(text):
            counts[word] += times
    known = set(fixed)
    by_frequency = sorted((word for word in counts if word not in known), key=lambda word: (-counts[word], word))
    # in alphabetical order, so that other amounts of the same texts give the same ids
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
