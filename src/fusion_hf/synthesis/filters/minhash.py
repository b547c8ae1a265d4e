"""Captions that are nearly alike, by datatrove's MinHash; needs the extra `synth`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fusion_hf.synthesis.choices import plain
from fusion_hf.synthesis.filters.across import text_key
from fusion_hf.synthesis.record import SynthRecord

try:
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer
except ModuleNotFoundError as error:
    raise ImportError("near-duplicates need datatrove: pip install fusion_hf[synth]") from error


class _Words(WordTokenizer):
    """Words between white space: datatrove takes the punctuation away before. Its own tokenizers need spaCy."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


@dataclass(frozen=True)
class MinHash:
    """
    How alike two captions have to be.

    Two texts that share a part s of their n-grams agree in a bucket with probability 1 - (1 - s^hashes)^buckets: with
    these, 92 % at s = 0.8 and 4 % at s = 0.5.

    Args:
        n_grams: words that are compared at a time; captions are short.
    """

    n_grams: int = 2
    buckets: int = 14
    hashes: int = 8
    seed: int = 1

    def config(self) -> MinhashConfig:
        """For datatrove."""
        # datatrove 0.10.1's other hash, xxhash, fails with xxhash 4, which takes bytes only
        return MinhashConfig(
            self.n_grams, self.buckets, self.hashes, self.seed, hash_config=HashConfig(hash_fc="sha1")
        )


class Stages(NamedTuple):
    """datatrove's four steps; each is a pipeline of its own, in this order, with so many tasks."""

    signature: Any  # behind a reader; as many tasks as there are
    buckets: Any  # `MinHash.buckets` tasks, or a multiple
    cluster: Any  # one task
    keep: Any  # behind the same reader with as many tasks as the first


class NearDuplicates:
    """
    Rejects a record whose caption is nearly one that came before, by datatrove's MinHash.

    In memory: for each caption `buckets` hashes and its id, so it is for one task and up to some million captions;
    `minhash_stages` is the same for many tasks.
    """

    name: ClassVar[str] = "near_duplicates"

    def __init__(self, settings: MinHash | None = None):
        self.settings = settings if settings is not None else MinHash()
        self.signer = _signer(self.settings, Path())
        self.seen: dict[bytes, str] = {}

    def check(self, record: SynthRecord) -> str | None:
        """A kept record counts from now on; a rejected one does not."""
        keys = self._keys(record.caption)
        found = next((self.seen[key] for key in keys if key in self.seen), None)
        if found is not None:
            return f"the caption is nearly that of {found}"
        self.seen.update(dict.fromkeys(keys, record.id))
        return None

    def _keys(self, caption: str) -> list[bytes]:
        shingles = self.signer.get_shingles(caption)
        if shingles.size == 0:  # fewer words than an n-gram has
            return [text_key("short", plain(caption))]
        signature = self.signer.get_signature(shingles)
        return [text_key(str(number), *map(str, hashes)) for number, hashes in enumerate(signature)]


def minhash_stages(folder: Path, settings: MinHash | None = None) -> Stages:
    """
    The same over all tasks of a run, on disk, for documents whose text is the caption.

    Args:
        folder: for what the stages hand on.
    """
    settings = settings if settings is not None else MinHash()
    signer = _signer(settings, folder / "signatures")
    config = settings.config()
    buckets = MinhashDedupBuckets(
        str(folder / "signatures"), str(folder / "pairs"), config=config, only_dedup_in_index=False
    )
    cluster = MinhashDedupCluster(str(folder / "pairs"), str(folder / "removed"), config=config)
    return Stages(signer, buckets, cluster, MinhashDedupFilter(str(folder / "removed")))


def _signer(settings: MinHash, folder: Path) -> MinhashDedupSignature:
    return MinhashDedupSignature(str(folder), settings.config(), language=_Words())
