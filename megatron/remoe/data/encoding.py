"""Text to tokens, many documents at a time and from several threads, with the ids that transformers would give.

`gigatoken` does the work; `tokenizers` (what transformers' fast tokenizers are made of) is the reference. The two know
different versions of Unicode: documents with characters that they treat differently are left to the reference.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

if TYPE_CHECKING:
    import tokenizers

CACHE_BYTES = 200 << 20  # gigatoken remembers every word that it meets; past this it is started anew
CACHE_BYTES_PER_THREAD = 50 << 20
CHARACTERS_BETWEEN_RESTARTS = 8 << 20
CHARACTERS_LOOKED_UP_AT_ONCE = 1 << 20
CHARACTERS_COMPARED_AT_ONCE = 64
CHARACTERS_ON_TRIAL = 1 << 15
CODE_POINTS = 0x110000
UNKNOWN, DIFFERENT, SAME = range(3)
TRIAL_TEXTS = (
    *("", " ", "\n", "  two  spaces \n\n\tand tabs\r\n", "It's we'll THEY'RE 'tis", "x1 22 333 4,444.5 ½ ²"),
    *("naïve Ωmega", "漢字とかな 한국어", "مرحبا שלום", "\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa"),
    *("def f(x):\n    return x**2  # ok\n", "\x00\x07\x7f\ufeff\u2028\xa0\u3000."),
)


@dataclass(frozen=True)
class Encoded:
    """Tokens of documents, one after the other, and how many each has.

    ids: shape [sum(lengths)]; lengths: shape [documents].
    """

    ids: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]

    def documents(self) -> list[npt.NDArray[np.integer]]:
        """The tokens of each document."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []

    def surrounded(self, prefix: Sequence[int], suffix: Sequence[int], which: npt.NDArray[np.bool_]) -> "Encoded":
        """The same with tokens put before and after the documents where `which` (shape [documents]) is true."""
        if not prefix and not suffix:
            return self
        lengths = self.lengths + which * (len(prefix) + len(suffix))
        ends = np.cumsum(lengths)
        ids = np.empty(int(lengths.sum()), dtype=self.ids.dtype)
        is_text = np.ones(len(ids), dtype=np.bool_)
        starts_and_ends = ((ends - lengths)[which], prefix), (ends[which] - len(suffix), suffix)
        for starts, tokens in starts_and_ends:
            places = starts[:, None] + np.arange(len(tokens))
            ids[places] = np.array(tokens, dtype=ids.dtype)
            is_text[places] = False
        ids[is_text] = self.ids
        return Encoded(ids, lengths)


class TextEncoder:
    """Encodes documents as `tokenizer(text).input_ids` of transformers does. Safe to use from several threads.

    Args:
        reference: the tokenizer whose ids count.
        vocabulary_size: its number of tokens, as Megatron counts it.
        end_of_document: id of the token that ends a document, if there is one.
        threads: how many threads will call `encode` at the same time.
    """

    def __init__(
        self, reference: "tokenizers.Tokenizer", vocabulary_size: int, end_of_document: int | None, threads: int = 1
    ) -> None:
        self.vocabulary_size, self.end_of_document = vocabulary_size, end_of_document
        self._reference = reference
        self._json = reference.to_str()
        self._prefix, self._suffix = _template(reference)
        config = json.loads(self._json)
        self.lossless = _is_lossless(config) and not self._prefix and not self._suffix
        self._lock = threading.Lock()
        self._restart_above = _resident_bytes() + CACHE_BYTES + threads * CACHE_BYTES_PER_THREAD
        self._since_restart = 0
        self._agreement = np.full(CODE_POINTS, UNKNOWN, dtype=np.uint8)
        self._on_trial = True
        self._fast = self._start_fast([token["content"] for token in config["added_tokens"]])

    @property
    def engine(self) -> str:
        """Name of the library at work."""
        return "tokenizers" if self._fast is None else "gigatoken"

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode documents; none may hold a lone surrogate. The ids are of type uint32."""
        if not texts:
            return _encoded([])
        if self._on_trial:
            self._try_on(texts)
        fast = self._fast
        if fast is None:
            return _encoded([encoding.ids for encoding in self._reference.encode_batch_fast(list(texts))])
        encoded = self._encode_fast(fast, texts)
        doubtful = [i for i, text in enumerate(texts) if not text.isascii() and self._is_doubtful(fast, text)]
        if doubtful:
            documents = encoded.documents()
            for i in doubtful:
                documents[i] = np.array(self._reference.encode(texts[i]).ids, dtype=np.uint32)
            encoded = _encoded(documents)
        self._restart_if_large(sum(map(len, texts)))
        return encoded

    def decode(self, ids: npt.NDArray[np.integer]) -> str:
        """The text of tokens (shape [tokens]), special ones included."""
        return self._reference.decode(ids.tolist(), skip_special_tokens=False)

    def _start_fast(self, specials: Sequence[str]) -> Any:
        """gigatoken's tokenizer, or None if it cannot take the reference's place."""
        import gigatoken

        try:
            fast = gigatoken.Tokenizer.from_json(self._json)
        except Exception:  # it has no type of its own for what it does not support
            return None
        texts = [*TRIAL_TEXTS, *(f"a{token} {token}{token}\n{token}b" for token in specials[:32])]
        return fast if all(self._agree(fast, texts)) else None

    def _encode_fast(self, fast: Any, texts: Sequence[str]) -> Encoded:
        layout = fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return Encoded(ids, np.diff(offsets)).surrounded(self._prefix, self._suffix, np.ones(len(texts), dtype=bool))

    def _agree(self, fast: Any, texts: Sequence[str]) -> list[bool]:
        documents = self._encode_fast(fast, texts).documents()
        expected = self._reference.encode_batch_fast(list(texts))
        return [document.tolist() == other.ids for document, other in zip(documents, expected, strict=True)]

    def _try_on(self, texts: Sequence[str]) -> None:
        """Compare the first documents of a run; where there is a difference the reference does all the work."""
        sample, characters = [], 0
        for text in texts:
            if characters + len(text) <= CHARACTERS_ON_TRIAL:
                sample.append(text)
                characters += len(text)
        if not sample:
            return
        with self._lock:
            fast = self._fast
            if self._on_trial and fast is not None:
                agree = self._agree(fast, sample)
                if not all(same or self._is_doubtful(fast, text) for same, text in zip(agree, sample, strict=True)):
                    self._fast = None
            self._on_trial = False

    def _is_doubtful(self, fast: Any, text: str) -> bool:
        """Whether the text has a character that the two libraries treat differently."""
        for start in range(0, len(text), CHARACTERS_LOOKED_UP_AT_ONCE):
            part = text[start : start + CHARACTERS_LOOKED_UP_AT_ONCE]
            code_points = np.frombuffer(part.encode("utf-32-le"), dtype="<u4")
            agreement = self._agreement[code_points]
            if agreement.min() == UNKNOWN:
                self._compare(fast, np.unique(code_points[agreement == UNKNOWN]))
                agreement = self._agreement[code_points]
            if agreement.min() == DIFFERENT:
                return True
        return False

    def _compare(self, fast: Any, code_points: npt.NDArray[np.uint32]) -> None:
        """Learn how the libraries treat characters: many in one text, and one by one where there is a difference."""
        step = CHARACTERS_COMPARED_AT_ONCE
        groups = [code_points[start : start + step] for start in range(0, len(code_points), step)]
        agree = self._agree(fast, ["".join(map(_trial_of, group)) for group in groups])
        for group, same in zip(groups, agree, strict=True):
            alone = SAME if same else np.where(self._agree(fast, [*map(_trial_of, group)]), SAME, DIFFERENT)
            self._agreement[group] = alone

    def _restart_if_large(self, characters: int) -> None:
        with self._lock:
            self._since_restart += characters
            if self._since_restart > CHARACTERS_BETWEEN_RESTARTS and _resident_bytes() > self._restart_above:
                import gigatoken

                self._fast = gigatoken.Tokenizer.from_json(self._json)
                self._since_restart = 0


def _encoded(documents: Sequence[Sequence[int] | npt.NDArray[np.integer]]) -> Encoded:
    arrays = [np.asarray(document, dtype=np.uint32) for document in documents]
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return Encoded(np.concatenate(arrays) if arrays else np.empty(0, dtype=np.uint32), lengths)


def _trial_of(code_point: int) -> str:
    """A text that shows whether a character counts as letter, number, space or none of these."""
    character = chr(code_point)
    return f"a{character}1{character}'s {character}\n"


def _template(reference: "tokenizers.Tokenizer") -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after every text."""
    whole, text = reference.encode("a").ids, reference.encode("a", add_special_tokens=False).ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    return whole[:start], whole[start + len(text) :]


def _is_lossless(config: dict[str, Any]) -> bool:
    """Whether decoding gives back every text exactly: bytes, and nothing normalized, stripped or put before."""
    return (
        (config["decoder"] or {}).get("type") == "ByteLevel"
        and config["normalizer"] is None
        and '"add_prefix_space": true' not in json.dumps(config["pre_tokenizer"])
        and not any(token["lstrip"] or token["rstrip"] for token in config["added_tokens"])
    )


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss
