"""Tokenizers: the built-in byte tokenizer, and InternLM2's own from local files.

No code of a tokenizer's directory is run. The published tokenizer_config.json names a class in such
code, but tokenizer.model or tokenizer.json is complete without it.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from models.byte_tokenizer import BYTE, CHAT_TOKENS, ByteTokenizer
from models.files import check_file, read_json, write_json

# Names of the chat tokens in the published tokenizer.model; data of the first releases uses them.
OLD_NAMES = {f"[UNUSED_TOKEN_{141 + i}]": name for i, name in enumerate(CHAT_TOKENS)}
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
_OLD_NAME = re.compile("|".join(map(re.escape, OLD_NAMES)))


@runtime_checkable
class Tokenizer(Protocol):
    """Interface of every tokenizer.

    A tokenizer can be pickled and used in forked processes. It accepts any str, and any id in
    0 .. vocab_size - 1.

    Attributes:
      name: name in logs and messages.
      fingerprint: hash that changes if any text might get other ids; used in cache keys.
      vocab_size: ids are below this number.
      unk_id, bos_id, eos_id, pad_id: special ids.
      im_start_id, im_end_id: ids that open and close a chat message; None: no such token.
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
        """Encode a text without bos or eos; the name of a special token becomes its id."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts as `encode`, on several cores if the tokenizer can."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Decode ids to text; a run of byte ids that is not UTF-8 becomes U+FFFD."""
        ...


def load_given_or(spec: str | None, default: str | Path) -> Tokenizer:
    """Load the tokenizer of --tokenizer, or, without one, the default of a model.

    Raises:
      FileNotFoundError, ValueError: as for `load_tokenizer`; a default that is missing is a
        ValueError that names the flag.
    """
    try:
        return load_tokenizer(spec or default)
    except FileNotFoundError as error:
        if spec is not None:
            raise
        raise ValueError(
            f"{error}: name one with --tokenizer ('byte' for a model that was trained on bytes)"
        ) from error


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
      spec: "byte", a SentencePiece tokenizer.model, or a directory with tokenizer.json or
        tokenizer.model.

    Raises:
      FileNotFoundError: the file or directory does not exist, or contains no tokenizer.
      ValueError: the files are damaged, Git LFS pointers, or usable only with code of their own.
    """
    if spec == BYTE:
        return ByteTokenizer()
    path = Path(spec)
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path} does not exist (built-in tokenizer: {BYTE!r})")
    if not path.is_dir():
        if path.suffix != ".model":
            raise ValueError(
                f"tokenizer file {path} must be a SentencePiece .model; for a tokenizer.json give "
                "its directory"
            )
        return _from_sentencepiece(path)
    config_path = path / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    has_model, has_json = (path / "tokenizer.model").exists(), (path / "tokenizer.json").exists()
    if has_json or (has_model and "added_tokens_decoder" in config):
        fast = _read_fast(path)
        _check_added_tokens(path, fast)
        return FastTokenizer(fast, name=path.resolve().name)
    if has_model:
        return _from_sentencepiece(path / "tokenizer.model")
    if "auto_map" in config:
        raise ValueError(
            f"the tokenizer in {path} needs code of that directory ({config['auto_map']}), which "
            "is not run: give a directory with tokenizer.json or tokenizer.model"
        )
    raise FileNotFoundError(f"{path} has neither tokenizer.json nor tokenizer.model")


def save_fast(source: Path, destination: Path) -> None:
    """Write the tokenizer of a directory as a tokenizer.json that needs no code of its own.

    The source has a tokenizer_config.json, and tokenizer.json or tokenizer.model.

    Raises:
      ValueError: the tokenizer cannot be read.
    """
    _read_fast(source).save_pretrained(destination)
    path = destination / "tokenizer_config.json"
    # transformers 5 writes its new name of this class, which transformers 4 does not accept.
    config = {**read_json(path), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("auto_map", None)
    write_json(path, config)


class FastTokenizer:
    """Tokenizer of the `tokenizers` library, with the interface `Tokenizer`."""

    def __init__(self, fast: Any, *, name: str):
        for kind in ("unk", "bos", "eos"):
            if getattr(fast, f"{kind}_token_id") is None:
                raise ValueError(f"tokenizer {name} names no {kind} token in its config")
        self.name = name
        self._backend = fast.backend_tokenizer
        state = json.loads(self._backend.to_str())
        state.pop("post_processor", None)  # adds bos and eos, which `encode` never does
        # A second name of a token, the one that it has in the published tokenizer.model.
        self._old_names = {
            old: new
            for old, new in OLD_NAMES.items()
            if self._backend.token_to_id(old) is None and self._backend.token_to_id(new) is not None
        }
        identity = json.dumps([state, self._old_names]).encode()
        self.fingerprint = hashlib.sha256(identity).hexdigest()[:16]
        self.vocab_size = len(fast)
        self.unk_id = fast.unk_token_id
        self.bos_id = fast.bos_token_id
        self.eos_id = fast.eos_token_id
        self.pad_id = self.eos_id if fast.pad_token_id is None else fast.pad_token_id
        self.im_start_id = self._backend.token_to_id("<|im_start|>")
        self.im_end_id = self._backend.token_to_id("<|im_end|>")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self._backend.encode(self._prepare(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        encodings = self._backend.encode_batch_fast(
            [self._prepare(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """See `Tokenizer`."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _prepare(self, text: str) -> str:
        """Replace old names of chat tokens, and surrogates, which Rust strings cannot contain."""
        if "[UNUSED_TOKEN_14" in text:
            text = _OLD_NAME.sub(lambda match: self._old_names.get(match[0], match[0]), text)
        if text.isascii():  # a stored property of every str, and true of most texts
            return text
        try:
            text.encode()
        except UnicodeEncodeError:
            return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        return text


def _from_sentencepiece(path: Path) -> FastTokenizer:
    """Load a bare tokenizer.model, whose unused tokens get the names of the chat tokens."""
    # Imported here, because processes that unpickle a tokenizer start sooner without it.
    from sentencepiece import sentencepiece_model_pb2

    check_file(path)
    # pyright sees no classes in protobuf's generated module
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError has no stable place to import from
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    added = {i: name for name, i in _added_tokens(path.parent).items()}
    special = {}
    for i, piece in enumerate(model.pieces):
        # Renamed in the model itself: next to a second name for its id, the first would become a
        # new id at the end. added_tokens.json may name unused tokens, too.
        name = OLD_NAMES.get(piece.piece) or piece.piece
        piece.piece = added.pop(i, name) if name.startswith("[UNUSED_TOKEN_") else name
        if piece.piece in ("<unk>", "<s>", "</s>", *CHAT_TOKENS):
            special[str(i)] = {"content": piece.piece, "special": True, "normalized": False}
    for i, name in sorted(added.items()):
        special.setdefault(str(i), {"content": name, "special": False, "normalized": False})
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
        fast = _read_fast(Path(directory))
    _check_added_tokens(path.parent, fast)
    return FastTokenizer(fast, name=str(path))


def _added_tokens(directory: Path) -> dict[str, int]:
    """Read the ids by name in added_tokens.json; {} without the file."""
    path = directory / "added_tokens.json"
    added = read_json(path) if path.exists() else {}
    if not all(type(i) is int and i >= 0 for i in added.values()):
        raise ValueError(f"{path} must contain an id for every name of a token")
    return added


def _check_added_tokens(directory: Path, fast: Any) -> None:
    """Check that a tokenizer has the tokens of added_tokens.json, with the ids there."""
    for name, i in _added_tokens(directory).items():
        if (found := fast.backend_tokenizer.token_to_id(name)) != i:
            raise ValueError(
                f"{directory / 'added_tokens.json'} gives {name!r:.80} the id {i}, but the "
                f"tokenizer gives it {'none' if found is None else found}: save the tokenizer as "
                "tokenizer.json (transformers: AutoTokenizer.from_pretrained, save_pretrained)"
            )


def _read_fast(path: Path) -> Any:
    for name in _FILES:
        if (path / name).exists():
            check_file(path / name)
    # Imported here, because importing transformers takes more than a second, and the byte
    # tokenizer does not need it. The variable suppresses advice about PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    # AutoTokenizer refuses a config that names remote code. LlamaTokenizer prefixes a space, and
    # appends the six chat tokens as new ids beyond the embedding.
    try:
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the Rust side raises bare Exception for a broken file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the tokenizer in {path} cannot be read: {first}") from error
