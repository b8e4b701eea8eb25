"""Text to ids and back: the built-in byte tokenizer, and InternLM2's own from local files.

No tokenizer here runs code that lies beside its files, and none adds ids: the published
tokenizer_config.json names a remote class, but its tokenizer.model or tokenizer.json says all.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from models.byte_tokenizer import BYTE, CHAT_TOKENS, ByteTokenizer


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer.

    Every tokenizer can be pickled and used in forked processes, and none raises on any str or on
    any id in 0 .. vocab_size - 1.

    Attributes:
      name: for logs.
      fingerprint: changes whenever any text might get other ids; for cache keys.
      vocab_size: ids are below this.
      unk_id, bos_id, eos_id, pad_id: special ids.
      im_start_id, im_end_id: ids that open and close a chat message; None: it has none.
    """

    name: str
    fingerprint: str
    vocab_size: int
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    im_start_id: int | None
    im_end_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos; the name of a special token in it is that token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores where the tokenizer can."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ids; a run of byte ids that is not UTF-8 becomes U+FFFD."""
        ...


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that a specification names.

    Args:
      spec: "byte", a SentencePiece tokenizer.model, or a directory with tokenizer.json or
        tokenizer.model.

    Raises:
      FileNotFoundError: there is no such file or directory, or no tokenizer in it.
      ValueError: the files need code of their own to be read, or are broken.
    """
    if spec == BYTE:
        return ByteTokenizer()
    path = Path(spec)
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path} does not exist (or name the built-in {BYTE!r})")
    if path.is_file():
        if path.suffix != ".model":
            raise ValueError(
                f"tokenizer file {path} must be a SentencePiece .model; for a tokenizer.json give "
                "its directory"
            )
        return _from_sentencepiece(path)
    config_path = path / "tokenizer_config.json"
    config = _read_config(config_path) if config_path.exists() else {}
    has_model, has_json = (path / "tokenizer.model").exists(), (path / "tokenizer.json").exists()
    if has_json or (has_model and "added_tokens_decoder" in config):
        return _from_directory(path, name=path.resolve().name)
    if has_model:
        return _from_sentencepiece(path / "tokenizer.model")
    if "auto_map" in config:
        raise ValueError(
            f"the tokenizer in {path} needs the code that lies beside it ({config['auto_map']}), "
            "which is not run: give a directory with tokenizer.json or tokenizer.model"
        )
    raise FileNotFoundError(f"{path} has neither tokenizer.json nor tokenizer.model")


def save_fast(source: Path, destination: Path) -> None:
    """Writes a directory's tokenizer as a tokenizer.json that loads anywhere without own code.

    Args:
      source: directory with tokenizer_config.json, and tokenizer.json or tokenizer.model.
      destination: an existing directory.

    Raises:
      ValueError: the tokenizer cannot be read.
    """
    _read_fast(source).save_pretrained(destination)
    path = destination / "tokenizer_config.json"
    # transformers 5 writes its new name for this class, which transformers 4 does not know.
    config = {**_read_config(path), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("auto_map", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class FastTokenizer:
    """A tokenizer of the `tokenizers` library behind the interface of this project."""

    def __init__(self, fast: Any, *, name: str):
        for kind in ("unk", "bos", "eos"):
            if getattr(fast, f"{kind}_token_id") is None:
                raise ValueError(f"tokenizer {name} names no {kind} token in its config")
        self.name = name
        self._backend = fast.backend_tokenizer
        self.fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]
        self.vocab_size = len(fast)
        self.unk_id = fast.unk_token_id
        self.bos_id = fast.bos_token_id
        self.eos_id = fast.eos_token_id
        self.pad_id = self.eos_id if fast.pad_token_id is None else fast.pad_token_id
        self.im_start_id = self._backend.token_to_id("<|im_start|>")
        self.im_end_id = self._backend.token_to_id("<|im_end|>")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self._backend.encode(_valid(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        encodings = self._backend.encode_batch_fast(
            [_valid(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """See `Tokenizer`."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def _from_sentencepiece(path: Path) -> FastTokenizer:
    """A bare tokenizer.model: its unnamed chat tokens get their published names."""
    # Here, and not above: processes that are handed a tokenizer start sooner without it.
    from sentencepiece import sentencepiece_model_pb2

    # pyright sees no classes in protobuf's generated module
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError has no stable place to import from
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    published = {f"[UNUSED_TOKEN_{141 + i}]": name for i, name in enumerate(CHAT_TOKENS)}
    special = {}
    for i, piece in enumerate(model.pieces):
        # Renamed in the model itself: beside a second name for its id, the first would become a
        # new id at the end.
        piece.piece = published.get(piece.piece, piece.piece)
        if piece.piece in ("<unk>", "<s>", "</s>", *CHAT_TOKENS):
            special[str(i)] = {"content": piece.piece, "special": True, "normalized": False}
    config = {
        "added_tokens_decoder": special,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "tokenizer.model").write_bytes(model.SerializeToString())
        Path(directory, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return _from_directory(Path(directory), name=str(path))


def _from_directory(path: Path, *, name: str) -> FastTokenizer:
    return FastTokenizer(_read_fast(path), name=name)


def _read_fast(path: Path) -> Any:
    # Here, and not above: importing transformers takes more than a second and prints advice about
    # PyTorch, and the byte tokenizer needs none of it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer (refuses a config that names remote code) and not LlamaTokenizer (prefixes
    # a space, and appends the six chat tokens as new ids beyond the embedding).
    try:
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the Rust side raises bare Exception for a broken file
        raise ValueError(f"the tokenizer in {path} cannot be read: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _valid(text: str) -> str:
    """The text with surrogates, which Rust strings cannot hold, replaced by U+FFFD."""
    if text.isascii():  # known of every str, whatever its length: this is most of them
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text
